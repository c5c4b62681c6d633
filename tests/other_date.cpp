// Another date: with LD_PRELOAD, the clock of a process is 400 days and six hours behind.
//
// It is behind, not ahead: who waits until a time of this clock then waits too short, not for 400 days.
#include <ctime>
#include <dlfcn.h>
#include <sys/time.h>

static const time_t SHIFT = 400 * 86400 + 6 * 3600;

template <typename Call> static Call real(const char *name) { return (Call)dlsym(RTLD_NEXT, name); }

extern "C" int clock_gettime(clockid_t clock, struct timespec *now) noexcept {
  static auto own = real<int (*)(clockid_t, struct timespec *)>("clock_gettime");
  int answer = own(clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec -= SHIFT;
  return answer;
}

extern "C" int gettimeofday(struct timeval *now, void *zone) noexcept {
  static auto own = real<int (*)(struct timeval *, void *)>("gettimeofday");
  int answer = own(now, zone);
  now->tv_sec -= SHIFT;
  return answer;
}

extern "C" time_t time(time_t *out) noexcept {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
