/* Preloaded before libc: counts memory that all threads of a process ask for. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static atomic_long requests, bytes; /* of at least `least` bytes */
static atomic_long live, peak;      /* since begin_counting */
static atomic_size_t least = (size_t)-1;

static void* note(void* place, size_t size) {
  if (size >= atomic_load(&least)) {
    atomic_fetch_add(&requests, 1);
    atomic_fetch_add(&bytes, (long)size);
  }
  const long held = (long)malloc_usable_size(place);
  const long now = atomic_fetch_add(&live, held) + held;
  long before = atomic_load(&peak);
  while (now > before && !atomic_compare_exchange_weak(&peak, &before, now)) {
  }
  return place;
}

void begin_counting(size_t size) {
  atomic_store(&requests, 0);
  atomic_store(&bytes, 0);
  atomic_store(&live, 0);
  atomic_store(&peak, 0);
  atomic_store(&least, size);
}

long counted_requests(void) { return atomic_load(&requests); }
long counted_bytes(void) { return atomic_load(&bytes); }
long counted_live(void) { return atomic_load(&live); }
long counted_peak(void) { return atomic_load(&peak); }

void free(void* place) {
  atomic_fetch_sub(&live, (long)malloc_usable_size(place));
  __libc_free(place);
}

void* malloc(size_t size) { return note(__libc_malloc(size), size); }

void* calloc(size_t number, size_t size) {
  return note(__libc_calloc(number, size), number * size);
}

void* realloc(void* old, size_t size) {
  atomic_fetch_sub(&live, (long)malloc_usable_size(old));
  return note(__libc_realloc(old, size), size);
}

void* memalign(size_t alignment, size_t size) {
  return note(__libc_memalign(alignment, size), size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** place, size_t alignment, size_t size) {
  void* memory = memalign(alignment, size);
  if (memory == NULL) return ENOMEM;
  *place = memory;
  return 0;
}
