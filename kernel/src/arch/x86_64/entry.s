# First instructions of the payload.
#
# Entered by kexec's purgatory in 64-bit mode, on whichever CPU panicked, with interrupts off, SSE
# unusable, and an identity mapping of memory in 2 MiB pages. RSI points to boot_params. Nothing is
# known of the other registers, and memory behind the loaded bytes is not zero.

    .section .text.entry, "ax"
    .global _start
_start:
    cli
    cld
    mov r12, rsi
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r13, rax

    # Zero-initialized memory.
    lea rdi, [rip + {bss_start}]
    lea rcx, [rip + {bss_end}]
    sub rcx, rdi
    shr rcx, 3
    xor eax, eax
    rep stosq

    # Addresses in data were linked for an image at 0: add where it really is.
    lea rbx, [rip + {image_start}]
    lea rsi, [rip + {rela_start}]
    lea rdi, [rip + {rela_end}]
1:
    cmp rsi, rdi
    jae 2f
    mov rcx, [rsi]
    mov rax, [rsi + 16]
    add rax, rbx
    mov [rbx + rcx], rax
    add rsi, 24
    jmp 1b
2:
    lea rsp, [rip + {stack} + {stack_size}]
    xor ebp, ebp
    mov rdi, r12
    mov rsi, r13
    call {entry}
    ud2
