//! Columns that are aligned to their widest cell.

use std::io::Write;

use crate::Error;

/// Where a column's cells stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Flush left: words.
    Left,
    /// Flush right: numbers.
    Right,
}

/// Writes `rows` below the names of their columns. The last column is not filled up with spaces.
///
/// # Errors
/// [`Error::Output`].
pub fn table<const N: usize>(
    columns: [(&str, Align); N],
    rows: &[[String; N]],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let length = |text: &str| text.chars().count();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| length(&row[column]));
        cells.chain([length(columns[column].0)]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let names: [String; N] = std::array::from_fn(|column| columns[column].0.to_owned());
    for row in std::iter::once(&names).chain(rows) {
        let cells =
            row.iter().zip(columns).zip(widths).map(|((cell, (_, align)), width)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
        let line = cells.collect::<Vec<_>>().join("  ");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["1", "a"], ["1000", "bc"]].map(|row| row.map(str::to_owned));
        let mut out = Vec::new();
        table([("N", Align::Right), ("NAME", Align::Left)], &rows, &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "   N  NAME\n   1  a\n1000  bc\n");
    }
}
