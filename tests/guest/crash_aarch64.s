// Ways to crash, each in a function that others called: with frame records as a compiler makes them.

// The kernel enters functions through pointers: with BTI they must begin with `bti c`.
.macro function name frame
    .p2align 2
    .type \name, %function
\name:
    hint #34
    stp x29, x30, [sp, #-\frame]!
    mov x29, sp
.endm

.macro end name frame
    ldp x29, x30, [sp], #\frame
    mov w0, wzr
    ret
    .size \name, . - \name
.endm

    .text

function null_deepest 32
    mov x0, xzr
    str x0, [x0, #8]
end null_deepest 32

function null_middle 80
    bl null_deepest
end null_middle 80

function set_null 16
    bl null_middle
end set_null 16

// BUG_BRK_IMM (arch/arm64/include/asm/brk-imm.h, 6.1).
function bug_deepest 48
.Lbug:
    brk #0x800
end bug_deepest 48

function set_bug 32
    bl bug_deepest
end set_bug 32

// Without an end: some 170 frames fill a stack.
function overflow_deeper 96
    bl overflow_deeper
end overflow_deeper 96

function set_overflow 16
    bl overflow_deeper
end set_overflow 16

function lockup_forever 32
.Lforever:
    yield
    b .Lforever
end lockup_forever 32

function set_lockup 64
    bl lockup_forever
end set_lockup 64

// Arguments that can be told from anything else, which no pointers are.
.macro argument number to
    movz \to, #0xaa, lsl #32
    movk \to, #\number*0x101
.endm

// Its twenty arguments: the first eight in registers, the others on the stack.
function many_pointers 32
    str x0, [x0]
end many_pointers 32

function set_many 32
    sub sp, sp, #96
.irp number, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20
    argument \number, x9
    str x9, [sp, #(\number-9)*8]
.endr
    argument 1, x0
    argument 2, x1
    argument 3, x2
    argument 4, x3
    argument 5, x4
    argument 6, x5
    argument 7, x6
    argument 8, x7
    bl many_pointers
    add sp, sp, #96
end set_many 32

// Hears nothing at all.
function set_spin 32
    msr daifset, #0xf
.Ldeaf:
    b .Ldeaf
end set_spin 32

// Where the kernel puts jumps to functions out of reach and to its tracer; it refuses a module without
// (arch/arm64/kernel/module-plts.c and module.c, 6.1).
    .section .plt, "ax", %progbits
    .byte 0
    .section .init.plt, "a", %progbits
    .byte 0
    .section .text.ftrace_trampoline, "ax", %progbits
    .byte 0
