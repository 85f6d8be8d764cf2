// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A plugin of QEMU's translator (TCG): writes down where indirect branches go.
 *
 *   -plugin branches.so,sites=FILE,edges=FILE
 *
 * `sites` has a line for each branch, its address in hexadecimal and the register that holds its target:
 * `ffffffff8123abcd rax`, sorted.  `edges` gets a line `ffffffff8123abcd ffffffff81456780` when a branch is
 * about to go somewhere for the first time.
 *
 * Debian's packages of QEMU have no qemu-plugin.h, so what is used of it is declared here, as QEMU's manual
 * describes it ("QEMU TCG Plugins").
 */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The interface; an id is a plugin's. */
typedef uint64_t qemu_plugin_id_t;
typedef struct { const char *target_name; } qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;
enum { CB_NO_REGS, CB_R_REGS, CB_RW_REGS };
typedef struct { struct qemu_plugin_register *handle; const char *name, *feature; } reg_descriptor;
typedef void (*udata_cb)(unsigned vcpu, void *data);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, unsigned));
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, udata_cb, int flags, void *data);

/* GLib's arrays, which the interface uses. */
typedef struct { char *data; unsigned len; } GArray;
typedef struct { uint8_t *data; unsigned len; } GByteArray;
GByteArray *g_byte_array_new(void);
GByteArray *g_byte_array_set_size(GByteArray *, unsigned);
GArray *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(struct qemu_plugin_register *, GByteArray *);

#define EXPORT __attribute__((visibility("default")))
/* The oldest version of the interface that has all of the above. */
EXPORT int qemu_plugin_version = 2;

static const char *const names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                      "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

struct site { uint64_t at; unsigned reg; };
static struct site *sites;
static size_t site_count;
static FILE *edges;

enum { VCPUS = 64 };
static struct { struct qemu_plugin_register *regs[16]; GByteArray *buffer; } vcpus[VCPUS];

/* What is known: a branch's number and the low half of where it goes.  Kernel addresses share the upper half. */
enum { SLOTS = 1 << 20 };
static uint64_t known[SLOTS];

static bool is_new(uint64_t key)
{
	for (size_t probe = 0, at = (key * UINT64_C(0x9e3779b97f4a7c15)) >> 44; probe < SLOTS; probe++, at++) {
		uint64_t *place = &known[at % SLOTS], none = 0;

		if (__atomic_load_n(place, __ATOMIC_RELAXED) == key)
			return false;
		if (__atomic_compare_exchange_n(place, &none, key, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
			return true;
		if (none == key)
			return false;
	}
	fprintf(stderr, "branches: more than %d edges\n", SLOTS);
	abort();
}

static void branch(unsigned vcpu, void *data)
{
	const struct site *site = data;
	struct qemu_plugin_register *reg = vcpus[vcpu].regs[site->reg];
	GByteArray *buffer = vcpus[vcpu].buffer;
	uint64_t to;

	g_byte_array_set_size(buffer, 0);
	if (qemu_plugin_read_register(reg, buffer) != sizeof to) {
		fprintf(stderr, "branches: %s cannot be read\n", names[site->reg]);
		abort();
	}
	memcpy(&to, buffer->data, sizeof to);
	if (is_new((uint64_t)(site - sites + 1) << 32 | (uint32_t)to)) {
		/* One line is one write: the lines of two processors do not mix. */
		fprintf(edges, "%016" PRIx64 " %016" PRIx64 "\n", site->at, to);
		fflush(edges);
	}
}

static int by_address(const void *a, const void *b)
{
	const struct site *one = a, *other = b;

	return (one->at > other->at) - (one->at < other->at);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	(void)id;
	for (size_t n = 0; n < qemu_plugin_tb_n_insns(tb); n++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, n);
		struct site key = {.at = qemu_plugin_insn_vaddr(insn)};
		struct site *site = bsearch(&key, sites, site_count, sizeof key, by_address);

		if (site)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, branch, CB_R_REGS, site);
	}
}

static void vcpu_init(qemu_plugin_id_t id, unsigned vcpu)
{
	GArray *all = qemu_plugin_get_registers();

	(void)id;
	if (vcpu >= VCPUS)
		abort();
	vcpus[vcpu].buffer = g_byte_array_new();
	for (unsigned n = 0; n < all->len; n++) {
		const reg_descriptor *one = (const reg_descriptor *)all->data + n;

		for (unsigned reg = 0; reg < 16; reg++)
			if (!strcmp(one->name, names[reg]))
				vcpus[vcpu].regs[reg] = one->handle;
	}
}

static bool read_sites(const char *path)
{
	FILE *file = fopen(path, "r");
	struct site one;
	char name[8];

	if (!file)
		return false;
	while (fscanf(file, "%" SCNx64 " %7s", &one.at, name) == 2) {
		for (one.reg = 0; one.reg < 16 && strcmp(name, names[one.reg]); one.reg++)
			;
		if (one.reg == 16)
			return false;
		sites = realloc(sites, (site_count + 1) * sizeof *sites);
		if (!sites)
			return false;
		sites[site_count++] = one;
	}
	bool whole = feof(file);
	fclose(file);
	return whole && site_count;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	(void)info;
	for (int n = 0; n < argc; n++) {
		if (!strncmp(argv[n], "sites=", 6) && !read_sites(argv[n] + 6))
			return -1;
		if (!strncmp(argv[n], "edges=", 6))
			edges = fopen(argv[n] + 6, "w");
	}
	if (!sites || !edges)
		return -1;
	qemu_plugin_register_vcpu_init_cb(id, vcpu_init);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
