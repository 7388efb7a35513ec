// Ways to crash, each in a function that others called: with frames as a compiler makes them and with
// the unwind table that goes with them (struct orc_entry, arch/x86/include/asm/orc_types.h, 6.1).

// From here on the caller's stack pointer is `distance` above this one's. The flags say "stack
// pointer" (5) and "the frame pointer is the caller's" (0).
.macro orc distance
.Lorc_\@:
    .pushsection .orc_unwind_ip, "a", %progbits
    .long .Lorc_\@ - .
    .popsection
    .pushsection .orc_unwind, "a", %progbits
    .short \distance, 0, 5
    .popsection
.endm

.macro function name frame
    .p2align 4
    .type \name, %function
\name:
    orc 8
    endbr64
    sub rsp, \frame
    orc 8+\frame
.endm

.macro end name frame
    add rsp, \frame
    orc 8
    xor eax, eax
    ret
    int3
    .size \name, . - \name
.endm

    .text

function null_deepest 24
    xor eax, eax
    mov [rax + 8], rax
end null_deepest 24

function null_middle 72
    call null_deepest
end null_middle 72

function set_null 8
    call null_middle
end set_null 8

function bug_deepest 40
.Lbug:
    ud2
end bug_deepest 40

function set_bug 24
    call bug_deepest
end set_bug 24

// Without an end: some 170 frames fill a stack.
function overflow_deeper 88
    call overflow_deeper
end overflow_deeper 88

function set_overflow 8
    call overflow_deeper
end set_overflow 8

function lockup_forever 24
.Lforever:
    pause
    jmp .Lforever
end lockup_forever 24

function set_lockup 56
    call lockup_forever
end set_lockup 56

// Arguments that can be told from anything else, which no pointers are.
.macro argument number to
    movabs rax, 0xaa00000000 + \number * 0x101
    mov \to, rax
.endm

// Its twenty arguments: the first six in registers, the others on the stack.
function many_pointers 24
    mov [rdi], rdi
end many_pointers 24

function set_many 120
.irp number, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20
    argument \number, [rsp+(\number-7)*8]
.endr
    argument 1, rdi
    argument 2, rsi
    argument 3, rdx
    argument 4, rcx
    argument 5, r8
    argument 6, r9
    call many_pointers
end set_many 120

// Hears nothing but NMIs.
function set_spin 24
    cli
.Ldeaf:
    pause
    jmp .Ldeaf
end set_spin 24
