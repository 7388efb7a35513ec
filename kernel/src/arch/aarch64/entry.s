// First instructions of the payload.
//
// Entered by kexec's purgatory at EL1 or EL2, on whichever CPU panicked, with exceptions masked, MMU
// and data cache off. X0 points to the device tree. Nothing is known of the other registers, the
// dead kernel's system registers are still set, and memory behind the loaded bytes is not zero.
// Memory is Device memory until the MMU is on: every access must be aligned, and no lock may be taken.

    .section .text.entry, "ax"
    .global _start
_start:
    msr daifset, #0xf
    mov x19, x0

    mrs x21, CurrentEL
    cmp x21, #2 << 2
    b.ne at_el1

    // At EL2: leave for EL1 with everything that EL2 could trap switched off. All further code then
    // knows one exception level only. Linux does the same at its start, on the same grounds
    // (arch/arm64/kernel/head.S and arch/arm64/include/asm/el2_setup.h, kernel 6.12).
    ldr x0, ={sctlr_el2_off}
    msr sctlr_el2, x0
    adrp x0, el2_vectors
    add x0, x0, :lo12:el2_vectors
    msr vbar_el2, x0
    ldr x1, ={sctlr_off}

    // Processors that know VHE only: they say so in ID_AA64MMFR4_EL1.E2H0 (negative), or show it
    // by one register where FAR_EL1 and FAR_EL2 should be two. HCR_EL2.E2H need not read as one.
    mrs x2, S3_0_C0_C7_4
    tbnz x2, #27, 1f
    mov x0, #1 << 31                // HCR_EL2: RW, EL1 is AArch64; no VHE, no stage 2, no traps
    dsb nsh
    msr hcr_el2, x0
    isb
    mov x0, #1
    msr far_el1, x0
    isb
    mov x0, #2
    msr far_el2, x0
    isb
    mrs x2, far_el1
    cmp x2, #2
    b.eq 1f

    msr sctlr_el1, x1
    mov x0, #0x33ff                 // CPTR_EL2: its bits that are one, which trap SVE and SME alone
    mrs x2, id_aa64pfr1_el1
    ubfx x2, x2, #24, #4            // FEAT_SME
    cbz x2, 0f
    bic x0, x0, #1 << 12            // TSM
0:
    mov x2, #3                      // CNTHCTL_EL2: EL1 reads counter and timer
    b 2f
1:
    mov x0, #1 << 31                // HCR_EL2: RW and E2H
    orr x0, x0, #1 << 34
    dsb nsh
    msr hcr_el2, x0
    isb
    msr S3_5_C1_C0_0, x1            // SCTLR_EL12
    ldr x0, =0x3330000              // CPTR_EL2 has CPACR_EL1's layout then: SMEN, FPEN, ZEN
    mov x2, #3 << 10 | 3
2:
    msr cptr_el2, x0
    msr cnthctl_el2, x2
    msr cntvoff_el2, xzr
    msr vttbr_el2, xzr
    msr hstr_el2, xzr
    mrs x0, mdcr_el2                // only HPMN stays, for which 0 is not allowed everywhere
    and x0, x0, #0x1f
    msr mdcr_el2, x0
    mrs x0, id_aa64mmfr1_el1
    ubfx x0, x0, #40, #4            // FEAT_HCX
    cbz x0, 3f
    mov x0, #3 << 14                // HCRX_EL2: TCR2_EL1 and SCTLR2_EL1 are EL1's, to be cleared there
    msr S3_4_C1_C2_2, x0
3:
    mrs x0, id_aa64mmfr0_el1
    ubfx x0, x0, #56, #4            // FEAT_FGT
    cbz x0, 4f
    msr S3_4_C1_C1_4, xzr           // HFGRTR_EL2
    msr S3_4_C1_C1_5, xzr           // HFGWTR_EL2
    msr S3_4_C1_C1_6, xzr           // HFGITR_EL2
4:
    tlbi alle1
    dsb sy
    mov x0, #0x3c5                  // SPSR_EL2: EL1h, everything masked
    msr spsr_el2, x0
    adr x0, at_el1
    msr elr_el2, x0
    isb
    eret

at_el1:
    ldr x0, ={sctlr_off}
    msr sctlr_el1, x0
    mov x0, #3 << 20                // CPACR_EL1: FPEN, as compiled code uses the vector registers
    mrs x1, id_aa64pfr1_el1
    ubfx x1, x1, #24, #4            // FEAT_SME
    cbz x1, 5f
    orr x0, x0, #3 << 24            // SMEN
    msr cpacr_el1, x0
    isb
    msr S0_3_C4_C6_3, xzr           // SMSTOP: a program may have been in streaming mode
5:
    msr cpacr_el1, x0
    adrp x0, {vectors}
    add x0, x0, :lo12:{vectors}
    msr vbar_el1, x0
    ic iallu
    dsb sy
    isb
    mrs x20, cntvct_el0

    // Zero-initialized memory.
    adrp x0, {bss_start}
    add x0, x0, :lo12:{bss_start}
    adrp x1, {bss_end}
    add x1, x1, :lo12:{bss_end}
6:
    cmp x0, x1
    b.hs 7f
    stp xzr, xzr, [x0], #16
    b 6b
7:
    // Addresses in data were linked for an image at 0: add where it really is.
    adrp x0, {image_start}
    add x0, x0, :lo12:{image_start}
    adrp x1, {rela_start}
    add x1, x1, :lo12:{rela_start}
    adrp x2, {rela_end}
    add x2, x2, :lo12:{rela_end}
8:
    cmp x1, x2
    b.hs 9f
    ldr x3, [x1]
    ldr x4, [x1, #16]
    add x4, x4, x0
    str x4, [x0, x3]
    add x1, x1, #24
    b 8b
9:
    // The payload runs on the stack pointer of EL0, so that the processor changes to another stack
    // by itself when an exception comes.
    msr spsel, #1
    adrp x0, {trap_stack}
    add x0, x0, :lo12:{trap_stack}
    mov x1, {trap_stack_size}
    add sp, x0, x1
    msr spsel, #0
    adrp x0, {stack}
    add x0, x0, :lo12:{stack}
    mov x1, {stack_size}
    add sp, x0, x1
    mov x29, xzr
    mov x30, xzr
    mov x0, x19
    mov x1, x20
    lsr x2, x21, #2
    bl {entry}
    brk #0

// Nothing comes to EL2 any more. If it does all the same, the machine restarts: PSCI SYSTEM_RESET.
    .section .text.el2_vectors, "ax"
    .balign 2048
el2_vectors:
    .rept 16
    .balign 128
    ldr w0, =0x84000009
    smc #0
    b .
    .endr
