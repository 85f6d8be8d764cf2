// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver with planted bugs, for Penumbra's tests.  Never load it anywhere else.
 *
 * Two arrays are accessed at an index from user space without a bounds check:
 *
 *  - the heap object behind the open file, a struct simple_attr (fs/libfs.c), which
 *    holds a function pointer that simple_attr_write() calls: kernel text, in the
 *    caller's own context, through a retpoline;
 *  - a local array of the ioctl, so that the caller reaches the return addresses
 *    further up the stack.
 *
 * A timer's and an NMI handler's function pointer, which __hrtimer_run_queues() and
 * nmi_handle() call, can be set as if they had been overwritten.  And a recursion that
 * the caller says the depth of takes the stack away from what is called in it.
 *
 * The module's own text takes no part in what follows from either.
 */
#include <asm/nmi.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/namei.h>
#include <linux/sched/task_stack.h>
#include <linux/uaccess.h>

#include "bug.h"

static int bug_get(void *data, u64 *value)
{
	*value = 0;
	return 0;
}

static int bug_set(void *data, u64 value)
{
	return 0;
}

static struct hrtimer bug_timer;
static struct nmiaction bug_nmi = { .name = "penumbra_bug" };
static DEFINE_MUTEX(bug_nmi_lock);

static void bug_start_timer(unsigned long function)
{
	hrtimer_cancel(&bug_timer);
	hrtimer_init(&bug_timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	bug_timer.function = (void *)function;
	hrtimer_start(&bug_timer, ms_to_ktime(5), HRTIMER_MODE_REL_PINNED_HARD);
}

static void bug_end_nmi(void)
{
	mutex_lock(&bug_nmi_lock);
	if (bug_nmi.handler)
		unregister_nmi_handler(NMI_LOCAL, bug_nmi.name);
	bug_nmi.handler = NULL;
	mutex_unlock(&bug_nmi_lock);
}

static long bug_start_nmi(unsigned long function)
{
	long result = -EBUSY;

	mutex_lock(&bug_nmi_lock);
	if (!bug_nmi.handler) {
		INIT_LIST_HEAD(&bug_nmi.list);
		bug_nmi.handler = (void *)function;
		result = __register_nmi_handler(NMI_LOCAL, &bug_nmi);
		if (result)
			bug_nmi.handler = NULL;
	}
	mutex_unlock(&bug_nmi_lock);
	return result;
}

/* Looks up a path of which nothing is there when no more than `left` bytes of the stack are left. */
static noinline long bug_deep(unsigned long left)
{
	u64 room[32];
	struct dentry *dentry;
	struct path path;
	long result;

	asm volatile("" : : "r"(room) : "memory");
	if (current_stack_pointer - (unsigned long)task_stack_page(current) > left) {
		result = bug_deep(left);
	} else {
		dentry = kern_path_create(AT_FDCWD, "/none/of/it", &path, 0);
		result = PTR_ERR_OR_ZERO(dentry);
		if (!result)
			done_path_create(&path, dentry);
	}
	asm volatile("" : : "r"(room) : "memory");
	return result;
}

static int bug_release(struct inode *inode, struct file *file)
{
	bug_end_nmi();
	return simple_attr_release(inode, file);
}

static int bug_open(struct inode *inode, struct file *file)
{
	return simple_attr_open(inode, file, bug_get, bug_set, "%llu\n");
}

/* Words are moved with plain loads and stores: the usercopy checks would see the bug. */
static noinline void move_words(u64 *to, const u64 *from, u64 count)
{
	while (count--) {
		WRITE_ONCE(*to, READ_ONCE(*from));
		to++;
		from++;
	}
}

static long bug_access(struct file *file, unsigned int command, const struct bug_access *access,
		       u64 *words)
{
	u64 local[4] = { 0 };
	u64 *array = local;

	OPTIMIZER_HIDE_VAR(array);
	switch (command) {
	case BUG_HEAP_WRITE:
		move_words((u64 *)file->private_data + access->index, words, access->count);
		return 0;
	case BUG_STACK_WRITE:
		move_words(array + access->index, words, access->count);
		return 0;
	case BUG_STACK_READ:
		move_words(words, array + access->index, access->count);
		return 0;
	default:
		return -ENOTTY;
	}
}

static long bug_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct bug_access access;
	void __user *user;
	size_t size;
	u64 *words;
	long result;

	switch (command) {
	case BUG_TIMER:
		bug_start_timer(argument);
		return 0;
	case BUG_NMI:
		return bug_start_nmi(argument);
	case BUG_DEEP:
		return bug_deep(argument);
	}
	if (copy_from_user(&access, (void __user *)argument, sizeof(access)))
		return -EFAULT;
	if (access.count > BUG_WORDS)
		return -EINVAL;
	user = u64_to_user_ptr(access.words);
	size = access.count * sizeof(u64);
	words = memdup_user(user, size);
	if (IS_ERR(words))
		return PTR_ERR(words);
	result = bug_access(file, command, &access, words);
	if (!result && command == BUG_STACK_READ && copy_to_user(user, words, size))
		result = -EFAULT;
	kfree(words);
	return result;
}

static const struct file_operations bug_operations = {
	.owner = THIS_MODULE,
	.open = bug_open,
	.release = bug_release,
	.read = simple_attr_read,
	.write = simple_attr_write,
	.unlocked_ioctl = bug_ioctl,
};

static struct miscdevice bug_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "penumbra_bug",
	.fops = &bug_operations,
	.mode = 0666,
};

static int __init bug_init(void)
{
	hrtimer_init(&bug_timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	return misc_register(&bug_device);
}
module_init(bug_init);

static void __exit bug_exit(void)
{
	misc_deregister(&bug_device);
	hrtimer_cancel(&bug_timer);
}
module_exit(bug_exit);

MODULE_DESCRIPTION("Planted bugs for Penumbra's tests");
MODULE_LICENSE("GPL");
