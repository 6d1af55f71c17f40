# A guest in a boot sector. It counts its boots in the second sector of its
# disk, writes "BOOT <n>" to the first serial port, and then does what the
# letter at offset 3 says:
#
#   w  waits for the power button, writes BYE and powers off
#   i  ignores the power button
#   o  powers off
#   r  resets at the first boot, and then is as w
#   f  writes to the serial port without end
#
#   as --32 -o guest.o guest.asm && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -e start -o guest.bin guest.o

	.code16
	.globl start
start:	jmp 1f
	nop
mode:	.byte 'w'
1:	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	movb %dl, drive

	movb $0x42, %ah			# read the count, add one, write it
	call disk
	incb 0x8000
	movb $0x43, %ah
	call disk

	movw $hello, %si
	call print
	movb 0x8000, %al
	addb $'0', %al
	call put
	movb $'\n', %al
	call put

	movb mode, %al
	cmpb $'o', %al
	je off
	cmpb $'f', %al
	je flood
	cmpb $'i', %al
	je idle
	cmpb $'r', %al
	jne button
	cmpb $1, 0x8000
	jne button
	movw $0xcf9, %dx		# reset
	movb $6, %al
	outb %al, %dx
idle:	hlt
	jmp idle

button:	movw $0x602, %dx		# listen to the power button
	movw $0x100, %ax
	outw %ax, %dx
	movw $0x600, %dx
2:	sti
	hlt				# the timer goes on ticking
	inw %dx, %ax
	testw $0x100, %ax
	jz 2b
	movw $bye, %si
	call print
off:	movw $0x604, %dx		# to sleep for good
	movw $0x2000, %ax
	outw %ax, %dx
	jmp idle

flood:	movb $'x', %al
	call put
	jmp flood

print:	lodsb
	orb %al, %al
	jz 3f
	call put
	jmp print
3:	ret

put:	pushw %dx
	movw $0x3f8, %dx
	outb %al, %dx
	popw %dx
	ret

disk:	movb drive, %dl
	xorb %al, %al
	movw $packet, %si
	int $0x13
	ret

packet:	.byte 16, 0
	.word 1, 0x8000, 0
	.quad 1
hello:	.asciz "BOOT "
bye:	.asciz "BYE\n"
drive:	.byte 0

	.org 510
	.word 0xaa55
