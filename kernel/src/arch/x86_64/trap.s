# Traps, and the one place where a trap is expected.

# One stub of 16 bytes for each exception vector: brings the stack to one shape, then meets the
# others in trap_common.
    .section .text.trap, "ax"
    .balign 16
    .global trap_stubs
trap_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    # These push an error code by themselves (Intel SDM 3A, 6.13).
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp trap_common
    .set vector, vector + 1
    .endr

    .balign 16
trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    call {handler}
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

# copy_old(to: rdi, from: rsi, size: rdx) -> 0, or 1 when a trap happened at one of the two copying
# instructions: the handler then goes on at copy_old_failed.
    .section .text.copy_old, "ax"
    .balign 16
    .global copy_old
copy_old:
    mov rcx, rdx
    shr rcx, 3
    and edx, 7
    .global copy_old_begin
copy_old_begin:
    rep movsq
    mov ecx, edx
    rep movsb
    .global copy_old_end
copy_old_end:
    xor eax, eax
    ret
    .global copy_old_failed
copy_old_failed:
    mov eax, 1
    ret
