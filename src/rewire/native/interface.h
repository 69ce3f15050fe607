// What Python passes to the library: plain structures, all sizes in elements. The same records stand in
// modules/packed/native.py; REWIRE_ABI changes with either.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr int32_t REWIRE_ABI = 1;

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Activation : int32_t { NONE = 0, GELU = 1, GELU_TANH = 2, QUICK_GELU = 3, RELU = 4, SILU = 5 };

// Attention within sequences laid one after the other: q, k, v and out are [tokens, heads, width] with unit stride in
// width. bias (or null): float, added to the scaled products of head, query and key positions within the sequence.
struct Attention {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  const float* bias;
  const int64_t* starts;  // [sequences + 1]
  int64_t sequences, tokens, heads, kv_heads, width;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;
  int64_t bias_head, bias_query, bias_key;
  float scale;
  int32_t type, threads, isa;
};

// out = activation(x @ weight.T + bias) + residual; x [rows, inputs] of `type`, out [rows, outputs] of `out_type`.
// With weights in INT8, x stays float or bfloat16 and is quantised row by row on the way in.
struct Product {
  const void* x;
  const void* weight;     // as `pack` left it
  const float* scales;    // INT8 weights: of each output, else null
  const float* bias;      // or null
  const void* residual;   // of type out_type, or null
  void* out;
  int64_t rows, inputs, outputs;
  int64_t x_row, residual_row, out_row;
  int32_t type, weight_type, out_type, activation, threads, isa;
};

// ---------------------------------------------------------------- between the library and its kernels

// One head's query rows [first, last) of one sequence.
struct AttentionTask {
  const Attention* job;
  int64_t start, length, first, last, head;
};

// Rows [first, last) and weight panels [panel, panel_end) of a product.
struct ProductTask {
  const Product* job;
  int64_t first, last, panel, panel_end;
};

struct Kernels {
  const char* name;
  int32_t lanes;
  int32_t fast_types;  // bit per Type whose products the instruction set has instructions for
  int64_t (*attention_scratch)(const Attention*);
  void (*attention)(const AttentionTask*, char* scratch);
  int64_t (*packed_bytes)(int64_t outputs, int64_t inputs, int32_t type);
  int64_t (*panels)(int64_t outputs);
  void (*pack)(const float* weight, int64_t outputs, int64_t inputs, int32_t type, void* packed, float* scales);
  int64_t (*product_scratch)(const Product*, int64_t rows);
  void (*product)(const ProductTask*, char* scratch);
};
