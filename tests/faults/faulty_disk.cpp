// A disk that fails: with LD_PRELOAD, the nth of the armed calls on a path below a folder fails, and all after it.
#include <cerrno>
#include <cstdarg>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

static std::string folder, armed;
static int left = 0, code = 0, hit = 0, calls = 0;
static bool done = false, broken = false;

// `also_done`: half of a write and the whole of a rename are done before it fails.
extern "C" void arm(const char *where, const char *call, int nth, int error, int also_done) {
  folder = where, armed = call, code = error, done = also_done, hit = calls = 0, broken = false;
  left = nth;
}

// How many calls failed.
extern "C" int disarm() {
  left = 0, broken = false;
  return hit;
}

// How many calls of the armed kind were made below the folder since then.
extern "C" int seen() { return calls; }

static bool fails(const char *call, const std::string &path) {
  if (armed != call || path.compare(0, folder.size(), folder) != 0) return false;
  calls++;
  if (!broken && (left == 0 || --left > 0)) return false;
  broken = true;  // and stays so, as a full or broken disk does
  hit++;
  errno = code;
  return true;
}

static bool fails(const char *call, int descriptor) {
  if (armed != call) return false;
  char path[4096];
  ssize_t size = readlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), path, sizeof path);
  return size > 0 && fails(call, std::string(path, size));
}

template <typename Call> static Call real(const char *name) { return (Call)dlsym(RTLD_NEXT, name); }

extern "C" ssize_t write(int descriptor, const void *bytes, size_t size) {
  bool first = !broken, failed = fails("write", descriptor);
  if (failed && !(first && done && size > 1)) return -1;
  return real<ssize_t (*)(int, const void *, size_t)>("write")(descriptor, bytes, failed ? size / 2 : size);
}

static ssize_t send(const char *name, int out, int in, off_t *offset, size_t size) {
  if (fails("write", out)) return -1;
  return real<ssize_t (*)(int, int, off_t *, size_t)>(name)(out, in, offset, size);
}

extern "C" ssize_t sendfile(int out, int in, off_t *offset, size_t size) { return send("sendfile", out, in, offset, size); }

extern "C" ssize_t sendfile64(int out, int in, off_t *offset, size_t size) {
  return send("sendfile64", out, in, offset, size);
}

extern "C" ssize_t read(int descriptor, void *bytes, size_t size) {
  bool failed = fails("read", descriptor);
  if (failed) {
    left = broken = 0;  // one bad place: the rest can be read
    return -1;
  }
  return real<ssize_t (*)(int, void *, size_t)>("read")(descriptor, bytes, size);
}

extern "C" int fsync(int descriptor) {
  return fails("fsync", descriptor) ? -1 : real<int (*)(int)>("fsync")(descriptor);
}

extern "C" int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", std::string(path)) ? -1 : real<int (*)(const char *, mode_t)>("mkdir")(path, mode);
}

extern "C" int rename(const char *from, const char *to) {
  bool failed = fails("rename", std::string(from));
  if (failed && !done) return -1;
  int answer = real<int (*)(const char *, const char *)>("rename")(from, to);
  if (!failed) return answer;
  errno = code;
  return -1;
}

extern "C" int open64(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  if ((flags & O_CREAT) && fails("open", std::string(path))) return -1;
  return real<int (*)(const char *, int, mode_t)>("open64")(path, flags, mode);
}
