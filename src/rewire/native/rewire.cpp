// The C interface: chooses the kernels, splits the work over threads, checks what would write out of bounds.
#include <atomic>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "interface.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

extern const Kernels portable;
#if defined(REWIRE_AVX2)
extern const Kernels avx2;
#endif
#if defined(REWIRE_AVX512)
extern const Kernels avx512;
#endif
#if defined(REWIRE_AVX512BF16)
extern const Kernels avx512bf16;
#endif

namespace {

enum Status : int32_t { DONE = 0, UNKNOWN_ISA = 1, BAD_STARTS = 2, BAD_SIZES = 3, NO_MEMORY = 4 };

// ---------------------------------------------------------------- instruction sets, the best first

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(REWIRE_AVX512BF16)
    if (has_avx512bf16()) list.push_back(&avx512bf16);
#endif
#if defined(REWIRE_AVX512)
    if (has_avx512()) list.push_back(&avx512);
#endif
#if defined(REWIRE_AVX2)
    if (has_avx2()) list.push_back(&avx2);
#endif
    list.push_back(&portable);
    return list;
  }();
  return found;
}

const Kernels* kernels(int32_t isa) {
  return isa >= 0 && size_t(isa) < available().size() ? available()[size_t(isa)] : nullptr;
}

// ---------------------------------------------------------------- threads

// GOMP_parallel of the OpenMP that torch has loaded, so that both share one set of threads; null: own threads.
typedef void (*Parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<Parallel> parallel{nullptr};

void run_on(int threads, void (*work)(void*), void* data) {
  if (threads <= 1) return work(data);
  if (Parallel shared = parallel.load()) return shared(work, data, unsigned(threads), 0);
  std::vector<std::thread> helpers;
  try {
    for (int t = 1; t < threads; ++t) helpers.emplace_back(work, data);
  } catch (...) {  // fewer threads than asked for; whoever is there does all the work
  }
  work(data);
  for (std::thread& helper : helpers) helper.join();
}

// Memory that a thread keeps for its next call.
char* scratch(int64_t bytes) {
  struct Kept {
    char* memory = nullptr;
    int64_t size = 0;
    ~Kept() { std::free(memory); }
  };
  static thread_local Kept kept;
  if (kept.size < bytes) {
    std::free(kept.memory);
    kept.size = (bytes + 4095) / 4096 * 4096;
    kept.memory = static_cast<char*>(std::aligned_alloc(64, size_t(kept.size)));
    if (!kept.memory) kept.size = 0;
  }
  return kept.memory;
}

// Units of work 0..count-1, handed out in groups to whichever thread is free.
template <class Unit>
int32_t share_out(int64_t count, int64_t group, int threads, int64_t bytes, const Unit& unit) {
  struct Shared {
    const Unit& unit;
    int64_t count, group, bytes;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } shared{unit, count, group, bytes};
  int64_t groups = (count + group - 1) / group;
  run_on(int(std::min<int64_t>(threads, groups)),
         [](void* data) {
           Shared& all = *static_cast<Shared*>(data);
           char* memory = scratch(all.bytes);
           if (!memory) return all.failed.store(true);
           for (int64_t first; (first = all.next.fetch_add(all.group)) < all.count;)
             for (int64_t u = first; u < std::min(first + all.group, all.count); ++u) all.unit(u, memory);
         },
         &shared);
  return shared.failed ? NO_MEMORY : DONE;
}

// ---------------------------------------------------------------- attention

constexpr int64_t CHUNK = 256;        // query rows of one task
constexpr int64_t SMALL_WORK = 20000;  // multiply-adds below which a second thread costs more than it gives

struct Piece {
  int64_t start, length, first, last;
};

// The sequences in pieces of at most CHUNK queries, the most work first, so that no thread ends with a long one.
std::vector<Piece> pieces_of(const Attention& job) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < job.sequences; ++s) {
    int64_t start = job.starts[s], length = job.starts[s + 1] - start;
    for (int64_t first = 0; first < length; first += CHUNK)
      pieces.push_back({start, length, first, std::min(first + CHUNK, length)});
  }
  auto work = [](const Piece& piece) { return piece.length * (piece.last - piece.first); };
  std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) { return work(a) > work(b); });
  return pieces;
}

bool are_starts_right(const Attention& job) {
  if (job.sequences < 0 || job.starts[0] != 0 || job.starts[job.sequences] != job.tokens) return false;
  for (int64_t s = 0; s < job.sequences; ++s)
    if (job.starts[s + 1] < job.starts[s]) return false;
  return true;
}

bool are_sizes_right(const Attention& job) {
  return job.width > 0 && job.width <= 256 && job.heads > 0 && job.kv_heads > 0 && job.heads % job.kv_heads == 0 &&
         (job.type == FLOAT32 || job.type == BFLOAT16);
}

}  // namespace

EXPORT int32_t rewire_abi() { return REWIRE_ABI; }

EXPORT int32_t rewire_isa_count() { return int32_t(available().size()); }
EXPORT const char* rewire_isa_name(int32_t isa) { return kernels(isa) ? kernels(isa)->name : ""; }
EXPORT int32_t rewire_fast_types(int32_t isa) { return kernels(isa) ? kernels(isa)->fast_types : 0; }

EXPORT void rewire_set_parallel(void* gomp_parallel) { parallel.store(reinterpret_cast<Parallel>(gomp_parallel)); }

EXPORT int32_t rewire_attention(const Attention* job) {
  const Kernels* best = kernels(job->isa);
  if (!best) return UNKNOWN_ISA;
  if (!are_sizes_right(*job)) return BAD_SIZES;
  if (!are_starts_right(*job)) return BAD_STARTS;
  std::vector<Piece> pieces = pieces_of(*job);
  int64_t units = int64_t(pieces.size()) * job->heads, work = 0;
  for (const Piece& piece : pieces) work += piece.length * (piece.last - piece.first) * job->width * job->heads;
  int threads = work < SMALL_WORK ? 1 : job->threads;
  // Neighbouring heads of one piece share cache lines, so they go to one thread while there is enough to share out.
  int64_t group = std::clamp<int64_t>(units / (16 * threads), 1, job->heads);
  return share_out(units, group, threads, best->attention_scratch(job), [&](int64_t unit, char* memory) {
    const Piece& piece = pieces[size_t(unit / job->heads)];
    AttentionTask task = {job, piece.start, piece.length, piece.first, piece.last, unit % job->heads};
    best->attention(&task, memory);
  });
}

// ---------------------------------------------------------------- products

EXPORT int64_t rewire_packed_bytes(int32_t isa, int64_t outputs, int64_t inputs, int32_t type) {
  return kernels(isa) ? kernels(isa)->packed_bytes(outputs, inputs, type) : -1;
}

EXPORT int32_t rewire_pack(int32_t isa, const float* weight, int64_t outputs, int64_t inputs, int32_t type, void* packed,
                           float* scales) {
  if (!kernels(isa)) return UNKNOWN_ISA;
  kernels(isa)->pack(weight, outputs, inputs, type, packed, scales);
  return DONE;
}

EXPORT int32_t rewire_product(const Product* job) {
  const Kernels* best = kernels(job->isa);
  if (!best) return UNKNOWN_ISA;
  if (job->inputs <= 0 || job->outputs <= 0 || job->rows < 0) return BAD_SIZES;
  int64_t panels = best->panels(job->outputs);
  int threads = job->rows * job->inputs * job->outputs < SMALL_WORK * 8 ? 1 : job->threads;
  // Blocks of rows that stay in the cache while the panels pass; where there are few rows, the panels are shared out.
  int64_t rows = std::clamp<int64_t>((job->rows + 2 * threads - 1) / (2 * threads), 48, 96);
  int64_t blocks = (job->rows + rows - 1) / rows;
  int64_t splits = blocks >= 2 * threads ? 1 : std::min<int64_t>(panels, (2 * threads + blocks - 1) / std::max<int64_t>(blocks, 1));
  if (threads == 1) splits = 1;
  return share_out(blocks * splits, 1, threads, best->product_scratch(job, rows), [&](int64_t unit, char* memory) {
    int64_t block = unit / splits, split = unit % splits;
    ProductTask task = {job, block * rows, std::min((block + 1) * rows, job->rows), panels * split / splits,
                        panels * (split + 1) / splits};
    best->product(&task, memory);
  });
}
