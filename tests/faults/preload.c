/* A slow disk, a failing disk and a clock that jumps, for processes that are started with LD_PRELOAD. Each is asked for
   by a variable of the environment; without one, every call is the C library's own.

   DPO_FAULTS_SLOW=MS           fsync, fdatasync and rename take MS milliseconds more, a write to a file a tenth of it
   DPO_FAULTS_EIO=N:COUNT:PATH  from the Nth write, fsync or read of a file below PATH on, COUNT of them fail with EIO
   DPO_FAULTS_CLOCK=FILE        the wall clock is off by as many seconds as FILE says now; it is read every 50 ms */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void sleep_a_share(int share) {
    const char *asked = getenv("DPO_FAULTS_SLOW");
    if (asked) usleep((useconds_t)(atof(asked) * 1000 / share));
}

static int is_file(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
}

static int fails(int fd) {
    static int seen = 0;
    const char *asked = getenv("DPO_FAULTS_EIO");
    if (!asked || !is_file(fd)) return 0;
    int first = 0, count = 0;
    char path[4096], link[64], target[4096];
    if (sscanf(asked, "%d:%d:%4095s", &first, &count, path) != 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    if (strncmp(target, path, strlen(path))) return 0;
    int number = __sync_add_and_fetch(&seen, 1);
    if (number < first || number >= first + count) return 0;
    errno = EIO;
    return 1;
}

int fsync(int fd) {
    REAL(fsync);
    if (fails(fd)) return -1;
    sleep_a_share(1);
    return real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    if (fails(fd)) return -1;
    sleep_a_share(1);
    return real(fd);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (getenv("DPO_FAULTS_EIO") || getenv("DPO_FAULTS_SLOW")) {
        if (fails(fd)) return -1;
        if (is_file(fd)) sleep_a_share(10);
    }
    return real(fd, data, size);
}

ssize_t read(int fd, void *data, size_t size) {
    REAL(read);
    if (getenv("DPO_FAULTS_EIO") && fails(fd)) return -1;
    return real(fd, data, size);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    sleep_a_share(1);
    return real(from, to);
}

static double offset(void) {
    static double known = 0;
    static long read_at = 0;
    const char *file = getenv("DPO_FAULTS_CLOCK");
    if (!file) return 0;
    REAL(clock_gettime);
    struct timespec now;
    real(CLOCK_MONOTONIC, &now);
    long milliseconds = now.tv_sec * 1000 + now.tv_nsec / 1000000;
    if (milliseconds - read_at > 50) {
        read_at = milliseconds;
        FILE *stream = fopen(file, "r");
        if (stream) {
            if (fscanf(stream, "%lf", &known) != 1) known = 0;
            fclose(stream);
        }
    }
    return known;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(clock_gettime);
    int code = real(clock, time);
    if (code == 0 && clock == CLOCK_REALTIME) time->tv_sec += (time_t)offset();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(gettimeofday);
    int code = real(now, zone);
    if (code == 0) now->tv_sec += (time_t)offset();
    return code;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (kept) *kept = now.tv_sec;
    return now.tv_sec;
}
