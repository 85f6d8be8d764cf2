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
 * The module's own text takes no part in what follows from either.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
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
	.release = simple_attr_release,
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
module_misc_device(bug_device);

MODULE_DESCRIPTION("Planted bugs for Penumbra's tests");
MODULE_LICENSE("GPL");
