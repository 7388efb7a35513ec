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

    mrs x0, CurrentEL
    cmp x0, #2 << 2
    b.ne at_el1

    // At EL2: leave for EL1 with everything that EL2 could trap switched off. All further code then
    // knows one exception level only. Linux does the same at its start, on the same grounds
    // (arch/arm64/include/asm/el2_setup.h, kernel 6.12).
    mov x0, #1 << 31                // HCR_EL2: RW, EL1 is AArch64; no VHE, no stage 2, no traps
    msr hcr_el2, x0
    isb
    ldr x1, ={sctlr_off}
    mrs x0, hcr_el2
    tbnz x0, #34, 1f                // E2H that cannot be cleared (processors with VHE alone)
    msr sctlr_el1, x1
    mov x0, #0x33ff                 // CPTR_EL2: its bits that are one, no traps
    mov x2, #3                      // CNTHCTL_EL2: EL1 reads counter and timer
    b 2f
1:
    msr S3_5_C1_C0_0, x1            // SCTLR_EL12
    mov x0, #3 << 20                // CPTR_EL2 has CPACR_EL1's layout then: FPEN
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
    msr S3_4_C1_C2_2, xzr           // HCRX_EL2: with it, TCR2_EL1 and SCTLR2_EL1 count as zero
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
5:
    cmp x0, x1
    b.hs 6f
    stp xzr, xzr, [x0], #16
    b 5b
6:
    // Addresses in data were linked for an image at 0: add where it really is.
    adrp x0, {image_start}
    add x0, x0, :lo12:{image_start}
    adrp x1, {rela_start}
    add x1, x1, :lo12:{rela_start}
    adrp x2, {rela_end}
    add x2, x2, :lo12:{rela_end}
7:
    cmp x1, x2
    b.hs 8f
    ldr x3, [x1]
    ldr x4, [x1, #16]
    add x4, x4, x0
    str x4, [x0, x3]
    add x1, x1, #24
    b 7b
8:
    // The payload runs on the stack pointer of EL0, so that the processor changes to another stack
    // by itself when an exception comes.
    msr spsel, #0
    adrp x0, {stack}
    add x0, x0, :lo12:{stack}
    mov x1, {stack_size}
    add sp, x0, x1
    mov x29, xzr
    mov x30, xzr
    mov x0, x19
    mov x1, x20
    bl {entry}
    brk #0
