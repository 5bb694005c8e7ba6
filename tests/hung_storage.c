// LD_PRELOAD: files under $HUNG_DIR do not answer while $HUNG_FLAG exists, as on a hung NFS mount.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void wait_path(const char *path) {
  const char *dir = getenv("HUNG_DIR"), *flag = getenv("HUNG_FLAG");
  if (path && dir && flag && !strncmp(path, dir, strlen(dir)))
    while (access(flag, F_OK) == 0) usleep(50000);
}

static void wait_fd(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length > 0) {
    path[length] = 0;
    wait_path(path);
  }
}

int open(const char *path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  mode_t mode = va_arg(list, mode_t);
  va_end(list);
  wait_path(path);
  return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  mode_t mode = va_arg(list, mode_t);
  va_end(list);
  wait_path(path);
  return REAL(open64)(path, flags, mode);
}

int stat64(const char *path, struct stat64 *buffer) {
  wait_path(path);
  return REAL(stat64)(path, buffer);
}

ssize_t write(int fd, const void *data, size_t size) {
  wait_fd(fd);
  return REAL(write)(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  wait_fd(fd);
  return REAL(pwrite64)(fd, data, size, offset);
}

int fsync(int fd) {
  wait_fd(fd);
  return REAL(fsync)(fd);
}
