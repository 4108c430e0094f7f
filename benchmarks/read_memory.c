// Writes to 1 GiB of fresh memory with every thread at once, then reads it several times. Prints the best GB/s of
// reading, and the seconds a GB of fresh memory takes: what loading a model costs beside its own work.
// cc -O3 -march=native -pthread read_memory.c && ./a.out THREADS
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { BYTES = 1 << 30, PASSES = 8, LINE = 64, AHEAD = 4096, MAX_THREADS = 1024 };

static char *buffer;
static size_t num_threads, share;  // bytes of one thread
static pthread_barrier_t barrier;
static double best, fresh;
static volatile uint64_t sink;  // the sums are used, so the reads are made

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static uint64_t sum(const char *bytes) {
  uint64_t total = 0;
  for (size_t i = 0; i < share; i += 4 * LINE) {  // the compiler makes vectors of the inner loop
    for (int k = 0; k < 4; k++) __builtin_prefetch(bytes + i + AHEAD + k * LINE, 0, 0);
    const uint64_t *words = (const uint64_t *)(bytes + i);
    for (size_t j = 0; j < 4 * LINE / sizeof *words; j++) total += words[j];
  }
  return total;
}

static void *work(void *argument) {
  size_t thread = (size_t)argument;
  char *mine = buffer + thread * share;
  pthread_barrier_wait(&barrier);
  double begin = now();
  memset(mine, 1, share);  // pages are given out when they are written to
  pthread_barrier_wait(&barrier);
  if (thread == 0) fresh = (now() - begin) / (share * num_threads / 1e9);
  for (int pass = 0; pass < PASSES; pass++) {
    pthread_barrier_wait(&barrier);
    double start = now();
    sink += sum(mine);
    pthread_barrier_wait(&barrier);
    double speed = share * num_threads / (now() - start) / 1e9;
    if (thread == 0 && speed > best) best = speed;
  }
  return NULL;
}

int main(int argc, char **argv) {
  num_threads = argc > 1 ? atoi(argv[1]) : 1;
  if (num_threads < 1 || num_threads > MAX_THREADS) return 2;
  pthread_t threads[MAX_THREADS];
  share = BYTES / num_threads / (4 * LINE) * (4 * LINE);
  buffer = aligned_alloc(1 << 21, BYTES + (1 << 21));
  if (buffer == NULL) return 1;
  madvise(buffer, BYTES, MADV_HUGEPAGE);
  pthread_barrier_init(&barrier, NULL, num_threads);
  for (size_t i = 0; i < num_threads; i++) pthread_create(&threads[i], NULL, work, (void *)i);
  for (size_t i = 0; i < num_threads; i++) pthread_join(threads[i], NULL);
  printf("%.3f %.3f\n", best, fresh);
  return 0;
}
