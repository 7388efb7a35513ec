//! Stories about the program `loader`, told with disk images: what it says, what it writes, and
//! above all what it does not write.

mod document;
mod images;
mod reserve;
mod save;
mod show;
