// Exceptions, and the one place where one is expected.

// 16 entries of 128 bytes: four kinds (synchronous, IRQ, FIQ, SError) from each of four states
// (this level on the stack of EL0, this level on its own stack, lower levels in 64 and 32 bits).
    .section .text.trap, "ax"
    .balign 2048
    .global trap_vectors
trap_vectors:
    .set entry_number, 0
    .rept 16
    .balign 128
    sub sp, sp, #{frame_size}
    stp x0, x1, [sp]
    mov x0, #entry_number
    b trap_common
    .set entry_number, entry_number + 1
    .endr

    .balign 128
trap_common:
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x19, [sp, #144]
    stp x20, x21, [sp, #160]
    stp x22, x23, [sp, #176]
    stp x24, x25, [sp, #192]
    stp x26, x27, [sp, #208]
    stp x28, x29, [sp, #224]
    mrs x1, sp_el0
    stp x30, x1, [sp, #240]
    mrs x1, elr_el1
    mrs x2, spsr_el1
    stp x1, x2, [sp, #256]
    mrs x1, esr_el1
    mrs x2, far_el1
    stp x1, x2, [sp, #272]
    str x0, [sp, #288]
    add x1, sp, #304
    // An SError comes anywhere, and the handler is compiled code.
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    str q\n, [x1, #16 * \n]
    .endr
    mov x0, sp
    bl {handler}
    add x1, sp, #304
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    ldr q\n, [x1, #16 * \n]
    .endr
    ldp x1, x2, [sp, #256]
    msr elr_el1, x1
    msr spsr_el1, x2
    ldp x2, x3, [sp, #16]
    ldp x4, x5, [sp, #32]
    ldp x6, x7, [sp, #48]
    ldp x8, x9, [sp, #64]
    ldp x10, x11, [sp, #80]
    ldp x12, x13, [sp, #96]
    ldp x14, x15, [sp, #112]
    ldp x16, x17, [sp, #128]
    ldp x18, x19, [sp, #144]
    ldp x20, x21, [sp, #160]
    ldp x22, x23, [sp, #176]
    ldp x24, x25, [sp, #192]
    ldp x26, x27, [sp, #208]
    ldp x28, x29, [sp, #224]
    ldr x30, [sp, #240]
    ldp x0, x1, [sp]
    add sp, sp, #{frame_size}
    eret

// load_byte, load_half, load_word(from: x0) -> w0, or all ones when that was an exception;
// store_byte, store_half, store_word(to: x0, value: w1). Each is one instruction that a hypervisor
// can emulate, between device_begin and device_end; the handler goes on at device_failed.
    .section .text.device, "ax"
    .balign 16
    .global device_begin, device_end, device_failed
    .global load_byte, load_half, load_word, store_byte, store_half, store_word
device_begin:
load_byte:
    ldrb w0, [x0]
    ret
load_half:
    ldrh w0, [x0]
    ret
load_word:
    ldr w0, [x0]
    ret
store_byte:
    strb w1, [x0]
    ret
store_half:
    strh w1, [x0]
    ret
store_word:
    str w1, [x0]
    ret
device_end:
device_failed:
    mov w0, #-1
    ret

// copy_old(to: x0, from: x1, size: x2) -> 0, or 1 when an exception happened between copy_old_begin
// and copy_old_end: the handler then goes on at copy_old_failed.
    .section .text.copy_old, "ax"
    .balign 16
    .global copy_old
copy_old:
    .global copy_old_begin
copy_old_begin:
    subs x2, x2, #64
    b.lo 2f
1:
    ldp q0, q1, [x1], #32
    ldp q2, q3, [x1], #32
    stp q0, q1, [x0], #32
    stp q2, q3, [x0], #32
    subs x2, x2, #64
    b.hs 1b
2:
    adds x2, x2, #64
    b.eq 4f
3:
    ldrb w3, [x1], #1
    strb w3, [x0], #1
    subs x2, x2, #1
    b.ne 3b
4:
    // An error of a load may come as an SError, later: wait for it here.
    dsb sy
    isb
    .global copy_old_end
copy_old_end:
    mov x0, #0
    ret
    .global copy_old_failed
copy_old_failed:
    mov x0, #1
    ret
