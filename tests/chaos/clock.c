// A system clock that is ahead of the kernel's by as many seconds as a file says (a 64-bit integer at its beginning),
// and that jumps when the file changes. Loaded before a program by LD_PRELOAD; GRASS_RAY_TEST_CLOCK names the file.
// Times that a program waits for by that clock are brought back to the kernel's. Time since the start is left alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define YEARS 1000000000  // in seconds; no machine is up for so long: a greater time is by the system clock

static const volatile int64_t *ahead_s;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static int64_t ahead(void) {
    static const int64_t none = 0;
    if (ahead_s == NULL) {
        const char *path = getenv("GRASS_RAY_TEST_CLOCK");
        int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        void *memory = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        ahead_s = memory == MAP_FAILED ? &none : memory;
    }
    return *ahead_s;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) real = next("clock_gettime");
    int code = real(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec time;
    if (zone != NULL || clock_gettime(CLOCK_REALTIME, &time) != 0) return -1;
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to != NULL) *to = now.tv_sec;
    return now.tv_sec;
}

static const struct timespec *of_kernel(const struct timespec *until, struct timespec *own) {
    if (until == NULL || until->tv_sec < YEARS) return until;
    *own = *until;
    own->tv_sec -= ahead();
    return own;
}

#define WAITS(name, object)                                                        \
    int name(object *waited, const struct timespec *until) {                       \
        static int (*real)(object *, const struct timespec *);                     \
        struct timespec own;                                                       \
        if (real == NULL) real = next(#name);                                      \
        return real(waited, of_kernel(until, &own));                               \
    }
WAITS(sem_timedwait, sem_t)
WAITS(pthread_mutex_timedlock, pthread_mutex_t)
WAITS(pthread_rwlock_timedrdlock, pthread_rwlock_t)
WAITS(pthread_rwlock_timedwrlock, pthread_rwlock_t)

int sem_clockwait(sem_t *waited, clockid_t clock, const struct timespec *until) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    struct timespec own;
    if (real == NULL) real = next("sem_clockwait");
    return real(waited, clock, of_kernel(until, &own));
}

int pthread_cond_timedwait(pthread_cond_t *waited, pthread_mutex_t *held, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec own;
    if (real == NULL) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return real(waited, held, of_kernel(until, &own));
}

int pthread_cond_clockwait(pthread_cond_t *waited, pthread_mutex_t *held, clockid_t clock, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec own;
    if (real == NULL) real = next("pthread_cond_clockwait");
    return real(waited, held, clock, of_kernel(until, &own));
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
    struct timespec own;
    if (real == NULL) real = next("clock_nanosleep");
    return real(clock, flags, (flags & TIMER_ABSTIME) ? of_kernel(until, &own) : until, left);
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    struct timespec own;
    long words[6];
    va_list given;
    va_start(given, number);
    for (int place = 0; place < 6; place++) words[place] = va_arg(given, long);
    va_end(given);
    if (real == NULL) real = next("syscall");
    if (number == SYS_futex && (words[1] & FUTEX_CLOCK_REALTIME))
        words[3] = (long)of_kernel((const struct timespec *)words[3], &own);
    if (number == SYS_clock_gettime) return clock_gettime((clockid_t)words[0], (struct timespec *)words[1]);
    return real(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}
