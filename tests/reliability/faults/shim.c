/* Counts the calls that change a filesystem, and fails, cuts short or kills at one of them.
 *
 * Loaded with LD_PRELOAD: whatever calls the C library passes through here, without a debugger's
 * cost for each call.  gcc -shared -fPIC -O1 -o shim.so shim.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, COUNT, KILL, FAIL, SHORT, TEAR };
enum kind {
    OPEN, MKDIR, WRITE, FALLOCATE, FSYNC, FDATASYNC, FTRUNCATE, RENAME, UNLINK, RMDIR,
    SYNC_RANGE, CHMOD, LINK, KINDS
};

static enum mode mode;
static long at;
static int code, struck;
static atomic_long total, counts[KINDS];

/* Begin counting; the `where`th call (of the writes only, for SHORT and TEAR) is the one. */
void shim_arm(int how, long where, int error) {
    memset(counts, 0, sizeof counts);
    total = 0;
    struck = -1;
    at = where;
    code = error;
    mode = how;
}

/* The kind of the call that was the one; -1 if it was never made. */
int shim_struck(void) { return struck; }

long shim_count(int kind) { return kind < 0 ? total : counts[kind]; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this call is to fail; does not return where it is to be killed before it. */
static int hit(enum kind kind) {
    if (mode == OFF) return 0;
    if ((mode == SHORT || mode == TEAR) && kind != WRITE) return 0;
    counts[kind]++;
    if (++total != at) return 0;
    struck = kind;
    if (mode == KILL) die();
    return mode == FAIL || mode == SHORT || mode == TEAR;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define GUARD(kind) \
    if (hit(kind)) { errno = code; return -1; }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        mode_t bits = 0; \
        REAL(name); \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            bits = va_arg(more, mode_t); \
            va_end(more); \
            if (flags & O_CREAT) GUARD(OPEN); \
        } \
        return real(path, flags, bits); \
    }
OPENS(open)
OPENS(open64)

#define OPENATS(name) \
    int name(int dir, const char *path, int flags, ...) { \
        mode_t bits = 0; \
        REAL(name); \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            bits = va_arg(more, mode_t); \
            va_end(more); \
            if (flags & O_CREAT) GUARD(OPEN); \
        } \
        return real(dir, path, flags, bits); \
    }
OPENATS(openat)
OPENATS(openat64)

/* Half of a write, and then the end for TEAR. */
#define HALF(call) \
    if (mode == SHORT || mode == TEAR) { \
        ssize_t done = call; \
        if (mode == TEAR) die(); \
        return done; \
    } \
    errno = code; \
    return -1;

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd > 2 && size && hit(WRITE)) { HALF(real(fd, data, (size + 1) / 2)) }
    return real(fd, data, size);
}

#define PWRITES(name, offset) \
    ssize_t name(int fd, const void *data, size_t size, offset where) { \
        REAL(name); \
        if (size && hit(WRITE)) { HALF(real(fd, data, (size + 1) / 2, where)) } \
        return real(fd, data, size, where); \
    }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (fd > 2 && hit(WRITE)) { HALF(real(fd, parts, 1)) }
    return real(fd, parts, count);
}

#define FALLOCATES(name, offset) \
    int name(int fd, offset start, offset size) { \
        REAL(name); \
        if (hit(FALLOCATE)) return code; \
        return real(fd, start, size); \
    }
FALLOCATES(posix_fallocate, off_t)
FALLOCATES(posix_fallocate64, off64_t)

#define SIMPLE(kind, name, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        GUARD(kind); \
        return real arguments; \
    }
SIMPLE(FALLOCATE, fallocate, (int fd, int how, off_t start, off_t size), (fd, how, start, size))
SIMPLE(FSYNC, fsync, (int fd), (fd))
SIMPLE(FDATASYNC, fdatasync, (int fd), (fd))
SIMPLE(FTRUNCATE, ftruncate, (int fd, off_t size), (fd, size))
SIMPLE(FTRUNCATE, ftruncate64, (int fd, off64_t size), (fd, size))
SIMPLE(FTRUNCATE, truncate, (const char *path, off_t size), (path, size))
SIMPLE(RENAME, rename, (const char *old, const char *new), (old, new))
SIMPLE(RENAME, renameat, (int a, const char *old, int b, const char *new), (a, old, b, new))
SIMPLE(RENAME, renameat2, (int a, const char *old, int b, const char *new, unsigned int flags),
       (a, old, b, new, flags))
SIMPLE(UNLINK, unlink, (const char *path), (path))
int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    GUARD(flags & AT_REMOVEDIR ? RMDIR : UNLINK);
    return real(dir, path, flags);
}
SIMPLE(RMDIR, rmdir, (const char *path), (path))
SIMPLE(MKDIR, mkdir, (const char *path, mode_t bits), (path, bits))
SIMPLE(MKDIR, mkdirat, (int dir, const char *path, mode_t bits), (dir, path, bits))
SIMPLE(SYNC_RANGE, sync_file_range, (int fd, off64_t start, off64_t size, unsigned int flags),
       (fd, start, size, flags))
SIMPLE(CHMOD, chmod, (const char *path, mode_t bits), (path, bits))
SIMPLE(CHMOD, fchmod, (int fd, mode_t bits), (fd, bits))
SIMPLE(LINK, symlink, (const char *old, const char *new), (old, new))
SIMPLE(LINK, link, (const char *old, const char *new), (old, new))
