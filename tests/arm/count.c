// A plugin for qemu-user: counts the instructions that the emulated program executes, and prints their number at its end.
// QEMU's plugin interface is declared here, since qemu-user comes without its header; VERSION is the interface's version.

#include <stdint.h>
#include <stdio.h>

struct qemu_plugin_tb;  // instructions that are translated and executed together
struct qemu_info_t;
typedef uint64_t qemu_plugin_id_t;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, void (*)(unsigned, void*), int, void*);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void*), void*);

static unsigned long long executed;  // by a single thread

static void execute(unsigned cpu, void* size) { (void)cpu, executed += (uintptr_t)size; }

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, execute, 0, (void*)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void finish(qemu_plugin_id_t id, void* data) {
    (void)id, (void)data;
    fprintf(stderr, "%llu instructions\n", executed);
}

int qemu_plugin_version = VERSION;

int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t* info, int count, char** arguments) {
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, finish, 0);
    return 0;
}
