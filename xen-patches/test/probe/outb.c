/* SPDX-License-Identifier: GPL-2.0-only */
/* Writes to an I/O port from user mode: outb PORT.  Build with -static. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>

int main(int argc, char **argv)
{
    unsigned long port = argc == 2 ? strtoul(argv[1], NULL, 0) : 0;

    if ( !port || ioperm(port, 1, 1) )
    {
        perror("ioperm");
        return 2;
    }
    outb(0, port);
    puts("written");
    return 0;
}
