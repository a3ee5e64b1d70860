// C counterparts of what `npm run bench` measures: the same algorithm and batching, bare. Each subcommand prints one
// figure. Build: cc -O2 -pthread -o twin twin.c
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#endif
#include <time.h>

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
static __thread uint32_t rng_state = 12345;
static inline uint32_t rng(void) {
  uint32_t x = rng_state;
  x ^= x << 13; x ^= x >> 17; x ^= x << 5;
  return rng_state = x;
}

// ── Split ring, two threads, batches ─────────────────────────────────────────────────────────────────────────────
#define Q 256
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
static struct desc descs[Q] __attribute__((aligned(4096)));
static struct { uint16_t flags; _Atomic uint16_t idx; uint16_t ring[Q]; } avail __attribute__((aligned(4096)));
static struct { uint16_t flags; _Atomic uint16_t idx; struct { uint32_t id, len; } ring[Q]; } used __attribute__((aligned(4096)));
static long ring_total;
static int ring_batch;
static volatile uint64_t sink;

static void *ring_device(void *arg) {
  uint16_t last = 0, out = 0;
  long done = 0;
  (void)arg;
  while (done < ring_total) {
    uint16_t idx = atomic_load_explicit(&avail.idx, memory_order_acquire);
    uint16_t n = idx - last;
    if (n == 0) { __builtin_ia32_pause(); continue; }
    if (n > ring_batch) n = ring_batch;
    for (uint16_t i = 0; i < n; i++) {
      uint16_t head = avail.ring[last & (Q - 1)];
      sink += descs[head].addr + descs[head].len;
      used.ring[out & (Q - 1)].id = head;
      used.ring[out & (Q - 1)].len = descs[head].len;
      last++; out++;
    }
    atomic_store_explicit(&used.idx, out, memory_order_release);
    done += n;
  }
  return NULL;
}

static void ring(int batch, long total) {
  pthread_t device;
  static uint16_t next[Q];
  uint16_t head = 0, free_count = Q, idx = 0, last_used = 0;
  long added = 0, reaped = 0;
  ring_total = total; ring_batch = batch;
  for (int i = 0; i < Q; i++) next[i] = i + 1;
  pthread_create(&device, NULL, ring_device, NULL);
  double t0 = now_s();
  while (reaped < total) {
    if (added < total && free_count >= batch) {
      int n = batch;
      if (n > total - added) n = total - added;
      for (int i = 0; i < n; i++) {
        descs[head].addr = 0x20000 + 256 * (uint64_t)i; descs[head].len = 256; descs[head].flags = 2;
        avail.ring[idx & (Q - 1)] = head;
        idx++; head = next[head];
      }
      free_count -= n; added += n;
      atomic_store_explicit(&avail.idx, idx, memory_order_release);
    }
    if (free_count < Q / 2 || added == total) {
      uint16_t u = atomic_load_explicit(&used.idx, memory_order_acquire);
      uint16_t n = u - last_used;
      if (n == 0) __builtin_ia32_pause();
      for (uint16_t i = 0; i < n; i++) {
        uint16_t id = used.ring[last_used & (Q - 1)].id;
        next[id] = head; head = id; last_used++;
      }
      free_count += n; reaped += n;
    }
  }
  printf("%.3f\n", total / (now_s() - t0) / 1e6);
  pthread_join(device, NULL);
}

// ── Buddy with per-CPU lists of orders 0–3 ───────────────────────────────────────────────────────────────────────
// The same algorithm as ours (`per-cpu-pages.ts`, `buddy.ts`) without counters and shadow, and without the zone's lock
// while one thread runs: lists by order and migratetype linked through the pages; per-CPU lists linked likewise, pushed at
// the head, refilled and drained at the tail by runs of blocks, a drain going round the orders from the one just freed;
// `high` and the batch tuned at run time; all given back when large blocks are freed one after the other; the look at the
// next buddy that decides between head and tail of a free list. With `pages` refills and drains go block by block, as Linux's do.
#define PAGES (1 << 17)
#define MAXO 10
#define TYPES 5
// Batch and limits that `setupWatermarks` gives the bench's guest of 512 MiB and one CPU.
#define BATCH 31
#define HIGH_MIN 852
#define HIGH_MAX 15104
// With two CPUs.
#define HIGH_MIN_TWO 426
#define HIGH_MAX_TWO 7552
#define SCALE_MAX 5
#define COSTLY 3
#define PAGEBLOCK 9
// One cache line per page, as `struct page` and our memmap have.
static struct { int32_t next, prev; int8_t order, buddy; char rest[54]; } pg[PAGES] __attribute__((aligned(64)));
static struct { int32_t head, tail; } areas[MAXO + 1][TYPES];
static int32_t nr_free[MAXO + 1];
static __thread int32_t pcp_count;
static uint8_t block_type[PAGES >> 9];
static void link_head(int32_t *head, int32_t *tail, int32_t p) {
  pg[p].next = *head; pg[p].prev = -1;
  if (*head >= 0) pg[*head].prev = p; else *tail = p;
  *head = p;
}
static void link_tail(int32_t *head, int32_t *tail, int32_t p) {
  pg[p].next = -1; pg[p].prev = *tail;
  if (*tail >= 0) pg[*tail].next = p; else *head = p;
  *tail = p;
}
static void unlink_page(int32_t *head, int32_t *tail, int32_t p) {
  if (pg[p].prev >= 0) pg[pg[p].prev].next = pg[p].next; else *head = pg[p].next;
  if (pg[p].next >= 0) pg[pg[p].next].prev = pg[p].prev; else *tail = pg[p].prev;
}
static void push(int32_t p, int o, int type) {
  pg[p].order = o; pg[p].buddy = 1; nr_free[o]++;
  link_head(&areas[o][type].head, &areas[o][type].tail, p);
}
static void drop(int32_t p, int o, int type) {
  unlink_page(&areas[o][type].head, &areas[o][type].tail, p);
  pg[p].buddy = 0; nr_free[o]--;
}
static int by_pages;
/* Takes up to `most` blocks of `order` that lie side by side: the first, and how many in `taken`. */
static int32_t buddy_alloc(int order, int most, int *taken) {
  int whole = by_pages ? order : order + 31 - __builtin_clz((unsigned)most);
  for (int o = order; o <= MAXO; o++) {
    int32_t p = areas[o][1].head;
    if (p < 0) continue;
    int run = o < whole ? o : whole;
    drop(p, o, 1);
    while (o > run) { o--; push(p + (1 << o), o, 1); }
    *taken = 1 << (run - order);
    return p;
  }
  return -1;
}
static void buddy_free(int32_t p, int o) {
  int type = block_type[p >> 9];
  while (o < MAXO) {
    int32_t b = p ^ (1 << o);
    if (!pg[b].buddy || pg[b].order != o) break;
    drop(b, o, block_type[b >> 9]);
    p &= ~(1 << o); o++;
  }
  if (o < MAXO - 1) {
    int32_t higher = (p & ~(1 << o)) ^ (1 << (o + 1));
    if (pg[higher].buddy && pg[higher].order == o + 1) {
      pg[p].order = o; pg[p].buddy = 1; nr_free[o]++;
      link_tail(&areas[o][type].head, &areas[o][type].tail, p);
      return;
    }
  }
  push(p, o, type);
}
static __thread struct { int32_t head, tail; } pcps[COSTLY + 1];
static __thread int free_count, prev_high, alloc_factor, high;
static int high_min = HIGH_MIN, high_max = HIGH_MAX, threads = 1;
static atomic_int zone_lock;
static void lock_zone(void) {
  if (threads > 1) while (atomic_exchange_explicit(&zone_lock, 1, memory_order_acquire)) __builtin_ia32_pause();
}
static void unlock_zone(void) { if (threads > 1) atomic_store_explicit(&zone_lock, 0, memory_order_release); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
/* Appends `count` blocks of `order` that lie side by side. */
static void push_run(int32_t first, int count, int order) {
  int32_t last = first + ((count - 1) << order), prev = pcps[order].tail;
  if (prev >= 0) pg[prev].next = first; else pcps[order].head = first;
  for (int32_t p = first; p <= last; prev = p, p += 1 << order) {
    pg[p].next = p == last ? -1 : p + (1 << order);
    pg[p].prev = prev;
  }
  pcps[order].tail = last;
}
/* Order of the block that the blocks at a list's end make up, the last of them being `p`. */
static int run_order(int32_t p, int order, int left) {
  int run = order;
  if (by_pages) return run;
  int32_t step = 1 << order, end = p + step;
  for (int32_t at = p; run < PAGEBLOCK && !(p & (1 << run)) && 2 << run <= left; run++)
    for (int32_t whole = p + (2 << run); end < whole; end += step, at += step)
      if (pg[at].prev != end) return run;
  return run;
}
static int32_t pcp_alloc(int order) {
  free_count >>= 1;
  if (pcps[order].head < 0) {
    int batch = order == 0 ? BATCH << alloc_factor : BATCH;
    high = min(high + batch, high_max);
    if (order == 0) {
      int most = max(high - pcp_count - BATCH, BATCH);
      if (batch <= most && alloc_factor < SCALE_MAX) alloc_factor++;
      batch = min(batch, most);
    }
    lock_zone();
    for (int want = max(batch >> order, 2), got = 0, taken = 0; got < want; got += taken) {
      int32_t p = buddy_alloc(order, want - got, &taken);
      if (p < 0) break;
      push_run(p, taken, order);
      pcp_count += taken << order;
    }
    unlock_zone();
  }
  int32_t p = pcps[order].head;
  if (p >= 0) { unlink_page(&pcps[order].head, &pcps[order].tail, p); pcp_count -= 1 << order; }
  return p;
}
static void pcp_free(int32_t p, int order) {
  alloc_factor >>= 1;
  link_head(&pcps[order].head, &pcps[order].tail, p);
  pcp_count += 1 << order;
  int free_high = order > 0 && free_count >= BATCH && prev_high && pcp_count >= BATCH;
  prev_high = order > 0;
  if (free_count < BATCH << SCALE_MAX) free_count += 1 << order;
  int limit = high;
  if (free_high) high = max(high - (BATCH << SCALE_MAX), high_min);
  else if (pcp_count >= limit && limit < free_count + BATCH) high = min(free_count + BATCH, high_max);
  if (!free_high && pcp_count < limit) return;
  int left = min(pcp_count, free_high ? BATCH << SCALE_MAX : max(BATCH, min(free_count, max(BATCH, limit - BATCH))));
  lock_zone();
  for (int o = order - 1; left > 0;) {
    do o = o == COSTLY ? 0 : o + 1; while (pcps[o].tail < 0);
    do {
      int32_t first = pcps[o].tail;
      int run = run_order(first, o, left);
      int32_t prev = pg[first + (1 << run) - (1 << o)].prev;
      pcps[o].tail = prev;
      if (prev >= 0) pg[prev].next = -1; else pcps[o].head = -1;
      left -= 1 << run;
      pcp_count -= 1 << run;
      buddy_free(first, run);
    } while (left > 0 && pcps[o].tail >= 0);
  }
  unlock_zone();
}
/* Two threads begin a round at once. */
static atomic_int come, turn;
static void meet(void) {
  int seen = turn;
  if (threads == 1) return;
  if (atomic_fetch_add(&come, 1) == 1) { come = 0; turn++; }
  else while (turn == seen) __builtin_ia32_pause();
}
#define ROUNDS 24
static int by_value(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }
struct load { const char *what; double ns[ROUNDS]; int32_t left; };
static void *buddy_load(void *arg) {
  struct load *load = arg;
  const char *what = load->what;
  int n = PAGES * 7 / 10 / threads;
  int32_t *held = malloc(n * sizeof *held);
  int8_t *orders = malloc(n);
  long ops = 0;
  high = high_min;
  for (int o = 0; o <= COSTLY; o++) pcps[o].head = pcps[o].tail = -1;
  for (int round = 0; round < ROUNDS; round++) {
    meet();
    double t0 = now_s();
    ops = 0;
    if (!strcmp(what, "mixed")) {
      static const int mix[8] = {0, 0, 0, 1, 0, 2, 3, 1};
      int count = 0;
      for (int i = 0; i < n / 2; i++) {
        int o = mix[i & 7];
        int32_t p = pcp_alloc(o);
        if (p < 0) break;
        held[count] = p; orders[count++] = o; ops++;
      }
      for (int i = 0; i < count; i++) { pcp_free(held[i], orders[i]); ops++; }
    } else {
      for (int i = 0; i < n; i++) held[i] = pcp_alloc(0);
      ops += n;
      if (!strcmp(what, "random")) {
        for (int i = n - 1; i > 0; i--) { int j = rng() % (i + 1); int32_t t = held[i]; held[i] = held[j]; held[j] = t; }
        meet();
        t0 = now_s(); ops = 0;
      }
      for (int i = 0; i < n; i++) pcp_free(held[i], 0);
      ops += n;
    }
    load->ns[round] = (now_s() - t0) * 1e9 / ops;
  }
  free(held);
  free(orders);
  qsort(load->ns, ROUNDS, sizeof load->ns[0], by_value);
  load->left = pcp_count;
  return NULL;
}
static void buddy(const char *what) {
  struct load loads[2] = {{.what = what}, {.what = what}};
  for (int o = 0; o <= MAXO; o++) for (int t = 0; t < TYPES; t++) areas[o][t].head = areas[o][t].tail = -1;
  memset(block_type, 1, sizeof block_type);
  for (int32_t p = 0; p < PAGES; p += 1 << MAXO) push(p, MAXO, 1);
  if (threads > 1) {
    pthread_t other;
    pthread_create(&other, NULL, buddy_load, &loads[1]);
    buddy_load(&loads[0]);
    pthread_join(other, NULL);
  } else buddy_load(&loads[0]);
  long pages = loads[0].left + loads[1].left;
  for (int o = 0; o <= MAXO; o++) pages += (long)nr_free[o] << o;
  if (pages != PAGES) { fprintf(stderr, "twin: %ld pages lost\n", PAGES - pages); exit(1); }
  // One thread: its best round. Two: the middle ones, since a round in which the other was late is not what is asked for.
  if (threads == 1) printf("%.3f\n", loads[0].ns[0]);
  else printf("%.3f\n", (loads[0].ns[ROUNDS / 2] + loads[1].ns[ROUNDS / 2]) / 2);
}

// ── Demand-zero fault: frame from a free list, zero, map in a two-level table ────────────────────────────────────
static void fault(void) {
  int frames = 65536;
  char *dram = mmap(NULL, (size_t)frames * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  static uint64_t table[65536];
  static int32_t list[65536];
  memset(dram, 1, (size_t)frames * 4096);
  double best = 1e9;
  for (int round = 0; round < 5; round++) {
    for (int i = 0; i < frames; i++) { list[i] = i; table[i] = 0; }
    int top = frames;
    double t0 = now_s();
    for (int gfn = 0; gfn < frames; gfn++) {
      if (table[gfn] & 1) continue;
      int32_t f = list[--top];
      memset(dram + (size_t)f * 4096, 0, 4096);
      table[gfn] = ((uint64_t)f << 12) | 7;
      *(volatile int *)(dram + (size_t)f * 4096) = gfn;
    }
    double ns = (now_s() - t0) * 1e9 / frames;
    if (ns < best) best = ns;
  }
  printf("%.3f\n", best);
}

// ── Spin ping-pong between two threads ───────────────────────────────────────────────────────────────────────────
static _Atomic uint32_t ball __attribute__((aligned(64)));
static void *pong(void *arg) {
  long n = (long)arg;
  for (long i = 0; i < n; i++) {
    while (atomic_load_explicit(&ball, memory_order_acquire) != 1) __builtin_ia32_pause();
    atomic_store_explicit(&ball, 0, memory_order_release);
  }
  return NULL;
}
enum { SLICE = 5000 };
static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}
static void pingpong(long n) {
  pthread_t t;
  pthread_create(&t, NULL, pong, (void *)n);
  /* In slices, of which the median counts. */
  double slices[1000];
  long nr = n / SLICE;
  for (long s = 0; s < nr; s++) {
    double t0 = now_s();
    for (long i = 0; i < SLICE; i++) {
      atomic_store_explicit(&ball, 1, memory_order_release);
      while (atomic_load_explicit(&ball, memory_order_acquire) != 0) __builtin_ia32_pause();
    }
    slices[s] = (now_s() - t0) * 1e9 / SLICE;
  }
  qsort(slices, nr, sizeof *slices, ascending);
  printf("%.3f\n", slices[nr / 2]);
  pthread_join(t, NULL);
}

/* Two threads that hand over to each other through a futex word each: what a controlled schedule does. */
static atomic_int turns[2];

static void sleep_until_turn(int me) {
  while (atomic_exchange_explicit(&turns[me], 0, memory_order_acquire) == 0)
    syscall(SYS_futex, &turns[me], FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
}
static void hand_over(int to) {
  atomic_store_explicit(&turns[to], 1, memory_order_release);
  syscall(SYS_futex, &turns[to], FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
static void *handed(void *arg) {
  for (long i = 0, n = (long)arg; i < n; i++) {
    sleep_until_turn(1);
    hand_over(0);
  }
  return NULL;
}
static void futex(long n) {
  pthread_t t;
  pthread_create(&t, NULL, handed, (void *)n);
  double t0 = now_s();
  for (long i = 0; i < n; i++) {
    hand_over(1);
    sleep_until_turn(0);
  }
  printf("%.3f\n", (now_s() - t0) * 1e9 / (2 * n));
  pthread_join(t, NULL);
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "ring")) ring(argc > 2 ? atoi(argv[2]) : 64, 20000000);
  else if (!strcmp(what, "buddy")) {
    by_pages = argc > 3 && !strcmp(argv[3], "pages");
    if (argc > 3 && !strcmp(argv[3], "two")) { threads = 2; high_min = HIGH_MIN_TWO; high_max = HIGH_MAX_TWO; }
    buddy(argc > 2 ? argv[2] : "bulk");
  }
  else if (!strcmp(what, "fault")) fault();
  else if (!strcmp(what, "pingpong")) pingpong(500000);
  else if (!strcmp(what, "futex")) futex(50000);
  else return fprintf(stderr, "twin ring|buddy|fault|pingpong|futex\n"), 2;
  return 0;
}
