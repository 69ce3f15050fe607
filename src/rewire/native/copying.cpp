// What the copy engine for checkpoints does most often and Python does slowly: transposing units of 2 bytes, and reading
// many short pieces of a file. Stands alone; called by stream/compiled.py. All sizes but rows and columns are in bytes;
// nothing needs to be aligned.
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#include <unistd.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

typedef uint16_t Unit;
constexpr int64_t WIDTH = sizeof(Unit);
constexpr int64_t BLOCK = 32;  // units along both sides: a row of a block is a cache line

void one_by_one(const char* taken, int64_t row, char* given, int64_t column, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) memcpy(given + c * column + r * WIDTH, taken + r * row + c * WIDTH, WIDTH);
}

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
// Eight by eight in registers: three rounds of interleaving rows i and i + 4.
void block(const char* taken, int64_t row, char* given, int64_t column) {
  typedef Unit Row __attribute__((vector_size(16)));
  constexpr int SIDE = 8;
  Row rows[SIDE], mixed[SIDE];
  for (int i = 0; i < SIDE; ++i) memcpy(&rows[i], taken + i * row, sizeof(Row));
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < SIDE / 2; ++i) {
      mixed[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    memcpy(rows, mixed, sizeof rows);
  }
  for (int i = 0; i < SIDE; ++i) memcpy(given + i * column, &rows[i], sizeof(Row));
}
constexpr int64_t SIDE = 8;
#else
void block(const char* taken, int64_t row, char* given, int64_t column) {
  one_by_one(taken, row, given, column, BLOCK, BLOCK);
}
constexpr int64_t SIDE = BLOCK;
#endif

void prefetch(const char* line) {
#if defined(__GNUC__)
  __builtin_prefetch(line);
#endif
}

}  // namespace

// given[column][row] = taken[row][column] for units of 2 bytes; rows of `taken` are `row` bytes apart, those of `given`
// `column`. Goes block after block down the rows, while the rows of the next block are on their way from memory.
EXPORT void rewire_transpose(const char* taken, int64_t row, char* given, int64_t column, int64_t rows,
                             int64_t columns) {
  const int64_t whole_rows = rows - rows % BLOCK, whole_columns = columns - columns % BLOCK;
  for (int64_t r = 0; r < whole_rows; r += BLOCK)
    for (int64_t c = 0; c < whole_columns; c += BLOCK) {
      for (int64_t next = r + BLOCK; next < rows && next < r + 2 * BLOCK; ++next)
        prefetch(taken + next * row + c * WIDTH);
      for (int64_t j = c; j < c + BLOCK; j += SIDE)  // whole lines of `given`, one after the other
        for (int64_t i = r; i < r + BLOCK; i += SIDE)
          block(taken + i * row + j * WIDTH, row, given + j * column + i * WIDTH, column);
    }
  one_by_one(taken + whole_columns * WIDTH, row, given + whole_columns * column, column, whole_rows,
             columns - whole_columns);
  one_by_one(taken + whole_rows * row, row, given + whole_rows * WIDTH, column, rows - whole_rows, columns);
}

#if !defined(_WIN32)
// Reads `count` pieces of `length` bytes, `stride` apart in the file from `start` on, to places `pitch` apart. Returns
// how many were read whole before one was not, for whatever reason.
EXPORT int64_t rewire_read(int32_t file, char* to, int64_t pitch, int64_t length, int64_t start, int64_t stride,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (pread(file, to + i * pitch, size_t(length), off_t(start + i * stride)) != length) return i;
  return count;
}
#endif
