// The module's parameters: whatever is written to /sys/module/crash/parameters/KIND crashes in that
// way. struct kernel_param and struct kernel_param_ops: include/linux/moduleparam.h, 6.1.

.macro parameter name
    .section .rodata.str, "aS", %progbits
.Lname_\name:
    .asciz "\name"

    .section .rodata.ops, "a", %progbits
    .p2align 3
.Lops_\name:
    .quad 0             // flags
    .quad set_\name     // set
    .quad 0             // get
    .quad 0             // free

    .section __param, "a", %progbits
    .p2align 3
    .quad .Lname_\name
    .quad __this_module
    .quad .Lops_\name
    .short 0200         // mode: the owner writes, nobody reads
    .byte 0xff, 0       // level -1, no flags
    .zero 4
    .quad 0             // no argument of its own
.endm

    parameter null
    parameter bug
    parameter overflow
    parameter lockup
    parameter spin
    parameter many

    .section .rodata.str, "aS", %progbits
.Lfile:
    .asciz "crash_module.s"

// A struct bug_entry (include/asm-generic/bug.h, 6.1, GENERIC_BUG_RELATIVE_POINTERS): the trap, the
// file, the line, no flags.
    .section __bug_table, "aw", %progbits
    .p2align 2
    .long .Lbug - .
    .long .Lfile - .
    .short 42, 0
