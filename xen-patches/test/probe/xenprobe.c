// SPDX-License-Identifier: GPL-2.0-only
/*
 * What only a guest's kernel can do, for guard-check.c to have refused or
 * reported.  For test guests: whoever may write to /proc/xenprobe owns them.
 *
 *   trap PORT COUNT        write to an I/O port, with known registers and stack
 *   freed KEY              write to port 0xe6 with the key in RDI
 *   read GFN               the page's first word, through a mapping of its own
 *   write GFN VALUE        write it, and read it back
 *   rmw GFN VALUE          the same with a locked exchange
 *   string GFN VALUE       the same with REP STOSB
 *   self GFN VALUE         let Xen write it: as the output of a hypercall
 *   remove GFN             XENMEM_decrease_reservation
 *   unmap GFN              XENMEM_remove_from_physmap
 *   populate GFN           XENMEM_populate_physmap, over what there is
 *   move FROM TO           XENMEM_add_to_physmap, XENMAPSPACE_gmfn
 *   cover GFN              XENMEM_add_to_physmap, XENMAPSPACE_grant_table
 *
 * Reading /proc/xenprobe gives the result of the last command.
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/xen/hypercall.h>
#include <xen/interface/memory.h>
#include <xen/interface/version.h>
#include <xen/interface/xen.h>

static char result[128] = "none\n";

/* A writable mapping of a gfn, be it the kernel's text, other RAM, or not RAM at all. */
static u64 *map_gfn(unsigned long gfn, bool *is_ram)
{
	struct page *page;

	*is_ram = page_is_ram(gfn);
	if (!*is_ram)
		return memremap(gfn << PAGE_SHIFT, PAGE_SIZE, MEMREMAP_WB);
	page = pfn_to_page(gfn);
	return vmap(&page, 1, VM_MAP, PAGE_KERNEL);
}

static void unmap_gfn(u64 *p, bool is_ram)
{
	if (is_ram)
		vunmap(p);
	else
		memunmap(p);
}

static noinline void trap(unsigned long port, unsigned long count)
{
	while (count--)
		asm volatile("push $0x333; push $0x222; push $0x111\n\t"
			     "mov $0xb0b0, %%rbx; mov $0xf0f, %%r15d\n\t"
			     "out %%al, %%dx\n\t"
			     "add $24, %%rsp"
			     : : "a" (0xaa), "d" (port) : "rbx", "r15", "memory", "cc");
}

static noinline void freed(u64 key)
{
	asm volatile("out %%al, %%dx" : : "a" (0), "d" (0xe6), "D" (key) : "memory");
}

static long memory(const char *command, unsigned long gfn, unsigned long to)
{
	xen_pfn_t pfn = gfn;
	struct xen_memory_reservation reservation = {
		.nr_extents = 1,
		.domid = DOMID_SELF,
	};
	struct xen_remove_from_physmap unmap = { .domid = DOMID_SELF, .gpfn = gfn };
	struct xen_add_to_physmap add = {
		.domid = DOMID_SELF,
		.space = XENMAPSPACE_gmfn,
		.idx = gfn,
		.gpfn = to,
	};

	set_xen_guest_handle(reservation.extent_start, &pfn);
	if (!strcmp(command, "remove"))
		return HYPERVISOR_memory_op(XENMEM_decrease_reservation, &reservation);
	if (!strcmp(command, "populate"))
		return HYPERVISOR_memory_op(XENMEM_populate_physmap, &reservation);
	if (!strcmp(command, "unmap"))
		return HYPERVISOR_memory_op(XENMEM_remove_from_physmap, &unmap);
	if (!strcmp(command, "cover")) {
		add.space = XENMAPSPACE_grant_table;
		add.idx = 0;
		add.gpfn = gfn;
	}
	return HYPERVISOR_memory_op(XENMEM_add_to_physmap, &add);
}

static void access(const char *command, unsigned long gfn, u64 value)
{
	bool is_ram;
	u64 *p = map_gfn(gfn, &is_ram), before;
	long rc = 0;

	if (!p) {
		snprintf(result, sizeof(result), "cannot map %#lx\n", gfn);
		return;
	}
	before = READ_ONCE(*p);
	if (!strcmp(command, "write")) {
		WRITE_ONCE(*p, value);
	} else if (!strcmp(command, "rmw")) {
		xchg(p, value);
	} else if (!strcmp(command, "string")) {
		void *d = p;
		unsigned long n = 8;

		asm volatile("rep stosb" : "+D" (d), "+c" (n) : "a" (value) : "memory");
	} else if (!strcmp(command, "self")) {
		/* "xen-3.0-x86_64p ...": a string that Xen writes where it is told to. */
		rc = HYPERVISOR_xen_version(XENVER_capabilities, p);
	}
	snprintf(result, sizeof(result), "before %#llx after %#llx rc %ld\n", before, READ_ONCE(*p), rc);
	unmap_gfn(p, is_ram);
}

static ssize_t probe_write(struct file *file, const char __user *user, size_t size, loff_t *pos)
{
	char line[80] = "", command[16];
	u64 a = 0, b = 0;

	if (size >= sizeof(line) || copy_from_user(line, user, size))
		return -EFAULT;
	if (sscanf(line, "%15s %lli %lli", command, &a, &b) < 2)
		return -EINVAL;
	if (!strcmp(command, "trap")) {
		trap(a, b);
		strscpy(result, "trapped\n", sizeof(result));
	} else if (!strcmp(command, "freed")) {
		freed(a);
		strscpy(result, "told\n", sizeof(result));
	} else if (!strcmp(command, "read") || !strcmp(command, "write") || !strcmp(command, "rmw") ||
		   !strcmp(command, "string") || !strcmp(command, "self")) {
		access(command, a, b);
	} else {
		snprintf(result, sizeof(result), "rc %ld\n", memory(command, a, b));
	}
	return size;
}

static ssize_t probe_read(struct file *file, char __user *user, size_t size, loff_t *pos)
{
	return simple_read_from_buffer(user, size, pos, result, strlen(result));
}

static const struct proc_ops probe_ops = {
	.proc_write = probe_write,
	.proc_read = probe_read,
};

static int __init probe_init(void)
{
	return proc_create("xenprobe", 0600, NULL, &probe_ops) ? 0 : -ENOMEM;
}

static void __exit probe_exit(void)
{
	remove_proc_entry("xenprobe", NULL);
}

module_init(probe_init);
module_exit(probe_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Penumbra: what Xen has to refuse a guest's kernel");
