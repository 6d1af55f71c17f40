# A boot sector that proves that a virtual processor runs code and does not
# merely interpret it: it enters long mode with paging, as kernels do early,
# runs a hundred million turns of a loop, uses SSE, takes an exception and
# returns from it. Then it writes 0x2a to port 0xf4, where QEMU's
# isa-debug-exit ends the process. GNU as, AT&T syntax; probe.bin is made by
#
#   as --64 -o probe.o probe.asm && ld -Ttext 0x7c00 --oformat binary -e start -o probe.bin probe.o

	.code16
	.globl start
start:
	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp

	# Page tables at 0x1000: the first 2 MiB, mapped to themselves.
	movw $0x1000, %di
	movw $0x1800, %cx
	rep stosw
	movw $0x2003, 0x1000
	movw $0x3003, 0x2000
	movw $0x0083, 0x3000

	lgdt gdtr
	movl $0x220, %eax		# PAE and OSFXSR
	movl %eax, %cr4
	movl $0x1000, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx		# EFER: long mode
	rdmsr
	orl $0x100, %eax
	wrmsr
	movl %cr0, %eax
	andl $0xfffffffb, %eax
	orl $0x80000003, %eax
	movl %eax, %cr0
	ljmp $8, $long

	.code64
long:
	movl $16, %eax
	movl %eax, %ss
	movl %eax, %ds
	movl %eax, %es

	# A gate for the invalid-opcode exception, in a table at 0x4000.
	movl $0x4060, %edi
	movl $invalid, %eax
	movw %ax, (%rdi)
	movl $0x8e000008, 2(%rdi)
	movl $0, 6(%rdi)
	movl $0, 10(%rdi)
	lidt idtr

	# A processor needs a twentieth of a second for this; an interpreter, minutes.
	movl $1, %eax
	movl $100000000, %ecx
1:	leal (%rax,%rax,4), %eax
	incl %eax
	decl %ecx
	jnz 1b

	movl %eax, %ebp
	movd %eax, %xmm0
	paddd %xmm0, %xmm0
	movd %xmm0, %ebx
	ud2
	subl %ebp, %ebx
	subl %ebp, %ebx
	jnz 2f
	cmpl $0x5a, %esi
	jne 2f
	movl $0x2a, %eax
	outb %al, $0xf4
2:	hlt
	jmp 2b

invalid:
	movl $0x5a, %esi
	addq $2, (%rsp)			# go on behind the ud2
	iretq

	.p2align 3
gdt:	.quad 0
	.quad 0x00209a0000000000
	.quad 0x0000920000000000
gdtr:	.word 23
	.long gdt
idtr:	.word 0x6f
	.quad 0x4000

	.org 510
	.word 0xaa55
