/* Preloaded into a process: its n-th change of the files under one folder goes wrong.

   It stands before libc, so it sees the writes of Python, SQLite, torch and safetensors alike. Each call that may change a file
   is counted and traced (what it is, and which path), in memory that forked children share with their parent. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum way { COUNT, ONCE, FULL, GONE, KILL, TORN };

static struct plan {
    long calls;          /* so far */
    long at;             /* the call that goes wrong, from 0 */
    int way;
    char folder[PATH_MAX];
    size_t traced;
    char trace[1 << 20]; /* a line a call: its kind and its path */
} *plan;

__attribute__((constructor)) static void begin(void) {
    plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (plan == MAP_FAILED) abort();
}

/* Begin to count the calls that change something in a folder; "" for none. */
void faults_arm(const char *folder, int way, long at) {
    plan->calls = 0, plan->traced = 0, plan->trace[0] = 0;
    plan->at = at, plan->way = way;
    snprintf(plan->folder, sizeof plan->folder, "%s", folder);
}

const char *faults_trace(void) { return plan->trace; }

/* What becomes of a call. */
enum verdict { DO, FAIL, HALF, HALF_AND_DIE };

static enum verdict judge(const char *kind, const char *path) {
    size_t length = plan ? strlen(plan->folder) : 0;
    if (length == 0 || strncmp(path, plan->folder, length) || (path[length] && path[length] != '/')) return DO;
    long call = __atomic_fetch_add(&plan->calls, 1, __ATOMIC_SEQ_CST);
    int room = sizeof plan->trace - plan->traced;
    int wrote = snprintf(plan->trace + plan->traced, room, "%s %s\n", kind, path);
    if (wrote < room) plan->traced += wrote;
    int writes = !strcmp(kind, "write"), needs_space = writes || !strcmp(kind, "create") || !strcmp(kind, "mkdir");
    switch (plan->way) {
    case ONCE:
        if (call != plan->at) return DO;
        errno = !strcmp(kind, "lock") ? ENOLCK : !strcmp(kind, "map") ? ENOMEM : EIO;
        return FAIL;
    case FULL: /* the write that fills the disk is cut short, and what comes after it finds no room */
        if (call < plan->at || !needs_space) return DO;
        errno = ENOSPC;
        return writes && call == plan->at ? HALF : FAIL;
    case GONE: /* the disk went read-only, as Linux makes one that fails */
        if (call < plan->at || !strcmp(kind, "lock")) return DO;
        errno = EROFS;
        return FAIL;
    case KILL:
        if (call == plan->at) kill(getpid(), SIGKILL);
        return DO;
    case TORN:
        if (call != plan->at) return DO;
        if (writes) return HALF_AND_DIE;
        kill(getpid(), SIGKILL);
    }
    return DO;
}

static enum verdict judge_descriptor(const char *kind, int file) {
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return DO;
    path[length] = 0;
    return judge(kind, path);
}

static enum verdict judge_path(const char *kind, int folder, const char *name) {
    char link[64], path[2 * PATH_MAX];
    if (name[0] == '/') return judge(kind, name);
    int before = errno;
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, path, PATH_MAX);
    errno = before;
    if (length < 0) return DO;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return judge(kind, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define FAILS(verdict) if ((verdict) == FAIL) return -1

/* -- opening: one kind where it makes a file, another where it opens one that is there for writing ---------------------- */

static enum verdict judge_open(int folder, const char *name, int flags) {
    struct stat there;
    int before = errno;
    int exists = fstatat(folder, name, &there, 0) == 0;
    errno = before;
    if ((flags & O_CREAT) && !exists) return judge_path("create", folder, name);
    return (flags & O_ACCMODE) == O_RDONLY ? DO : judge_path(flags & O_TRUNC ? "empty" : "open", folder, name);
}

#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                    \
        va_list more;                                               \
        va_start(more, flags);                                      \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                               \
        FAILS(judge_open(AT_FDCWD, path, flags));                   \
        return REAL(name)(path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                \
    int name(int folder, const char *path, int flags, ...) {        \
        va_list more;                                               \
        va_start(more, flags);                                      \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                               \
        FAILS(judge_open(folder, path, flags));                     \
        return REAL(name)(folder, path, flags, mode);               \
    }
OPENAT(openat)
OPENAT(openat64)

/* -- writing ------------------------------------------------------------------------------------------------------------ */

#define WRITES(type, name, parameters, whole, half)     \
    type name parameters {                              \
        enum verdict verdict = judge_descriptor("write", file); \
        FAILS(verdict);                                 \
        if (verdict == DO) return REAL(name) whole;     \
        type done = REAL(name) half;                    \
        if (verdict == HALF_AND_DIE) kill(getpid(), SIGKILL); \
        return done;                                    \
    }
#define LESS(n) ((n) > 1 ? (n) / 2 : (n))
WRITES(ssize_t, write, (int file, const void *from, size_t n), (file, from, n), (file, from, LESS(n)))
WRITES(ssize_t, pwrite, (int file, const void *from, size_t n, off_t at), (file, from, n, at), (file, from, LESS(n), at))
WRITES(ssize_t, pwrite64, (int file, const void *from, size_t n, off64_t at), (file, from, n, at), (file, from, LESS(n), at))
WRITES(ssize_t, writev, (int file, const struct iovec *from, int n), (file, from, n), (file, from, LESS(n)))
WRITES(ssize_t, sendfile, (int file, int from, off_t *at, size_t n), (file, from, at, n), (file, from, at, LESS(n)))
WRITES(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t n), (file, from, at, n), (file, from, at, LESS(n)))
WRITES(ssize_t, copy_file_range, (int from, off64_t *in, int file, off64_t *out, size_t n, unsigned flags),
       (from, in, file, out, n, flags), (from, in, file, out, LESS(n), flags))

/* -- everything else: as a whole or not ----------------------------------------------------------------------------------- */

#define ON_DESCRIPTOR(name, kind, parameters, arguments)    \
    int name parameters {                                   \
        FAILS(judge_descriptor(kind, file));                \
        return REAL(name) arguments;                        \
    }
ON_DESCRIPTOR(fsync, "flush", (int file), (file))
ON_DESCRIPTOR(fdatasync, "flush", (int file), (file))
ON_DESCRIPTOR(ftruncate, "truncate", (int file, off_t n), (file, n))
ON_DESCRIPTOR(ftruncate64, "truncate", (int file, off64_t n), (file, n))
ON_DESCRIPTOR(fchmod, "mode", (int file, mode_t mode), (file, mode))

#define ON_PATH(name, kind, parameters, folder, path, arguments) \
    int name parameters {                                        \
        FAILS(judge_path(kind, folder, path));                   \
        return REAL(name) arguments;                             \
    }
ON_PATH(rename, "rename", (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_PATH(renameat, "rename", (int a, const char *from, int b, const char *to), b, to, (a, from, b, to))
ON_PATH(renameat2, "rename", (int a, const char *from, int b, const char *to, unsigned f), b, to, (a, from, b, to, f))
ON_PATH(link, "rename", (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_PATH(linkat, "rename", (int a, const char *from, int b, const char *to, int f), b, to, (a, from, b, to, f))
ON_PATH(symlink, "create", (const char *from, const char *to), AT_FDCWD, to, (from, to))
ON_PATH(unlink, "unlink", (const char *path), AT_FDCWD, path, (path))
ON_PATH(unlinkat, "unlink", (int a, const char *path, int f), a, path, (a, path, f))
ON_PATH(rmdir, "unlink", (const char *path), AT_FDCWD, path, (path))
ON_PATH(chmod, "mode", (const char *path, mode_t mode), AT_FDCWD, path, (path, mode))

/* A folder that is there changes nothing, and the kernel says that it is before it looks for room. */
int mkdirat(int folder, const char *path, mode_t mode) {
    struct stat there;
    if (fstatat(folder, path, &there, 0)) FAILS(judge_path("mkdir", folder, path));
    return REAL(mkdirat)(folder, path, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int flock(int file, int operation) {
    if (!(operation & LOCK_UN)) FAILS(judge_descriptor("lock", file));
    return REAL(flock)(file, operation);
}

#define FCNTL(name)                                                                      \
    int name(int file, int command, ...) {                                               \
        va_list more;                                                                    \
        va_start(more, command);                                                         \
        void *argument = va_arg(more, void *);                                           \
        va_end(more);                                                                    \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW; \
        if (locks && ((struct flock *)argument)->l_type != F_UNLCK) FAILS(judge_descriptor("lock", file)); \
        return REAL(name)(file, command, argument);                                      \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

#define MAP(name, offset)                                                                             \
    void *name(void *address, size_t n, int protection, int flags, int file, offset at) {             \
        int shared = file >= 0 && (protection & PROT_WRITE) && (flags & (MAP_SHARED | MAP_PRIVATE)) == MAP_SHARED; \
        if (shared && judge_descriptor("map", file) == FAIL) return MAP_FAILED;                       \
        return REAL(name)(address, n, protection, flags, file, at);                                   \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
