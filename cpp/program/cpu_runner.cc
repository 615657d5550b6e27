// Runs a Program on the CPU. Receives a StepBatch from executor.cc, lowers each node to tiles of kernels
// (kernels/kernels.h) on the thread pool, hands sampled tokens back. One call of Forward and one of Head a step.
//
// A phase is one ParallelFor; its end is the barrier the next phase relies on. kQkv is two phases (GEMM, then rope and
// KV write), so when a layer's attention starts, the KV of all of the step's tokens is in the pool: a row may read a
// prefix that another row of the same step computes. How work is cut into tiles is chosen for speed alone; the
// kernels' contract keeps it out of the bits.
#include "program/cpu_runner.h"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/huge_buffer.h"
#include "batch/shared_prefix.h"
#include "program/arena.h"
#include "program/fp_mode.h"
#include "program/program_check.h"
#include "program/sample_rows.h"
#include "sampling/sampler.h"

namespace sapwood {
namespace {

constexpr int32_t kLogitBlock = 64;  // logit rows per pass of the head: bounds the memory of the logits
constexpr int32_t kGemmRows = 96;    // rows of a tile once there are more than twice as many
constexpr int32_t kAttentionRows = 96;  // (query, head) rows of an item: what the kernel takes together
// Long items are cut by keys where that is needed to give every thread about kTilesPerThread of them. Chunks of a cut
// meet in memory, 0.4 % of what is read per query head, so this bounds the memory and nothing else.
constexpr int64_t kMinCutChunks = 4;
constexpr int64_t kRowsPerReading = 4;  // decoding rows that multiply a page in the time that reading it takes
constexpr size_t kMaxPartialBytes = size_t{64} << 20;
// Panels of a call: the kernel makes rows ready once for as many, and fetches the panel after the one it multiplies, which
// is its thread's own next: threads walk through the panels in runs.
constexpr int64_t kPanelsPerRun = 4;
constexpr int64_t kTilesPerThread = 16;  // a step waits for the last tile: half of one per thread is lost at each node

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec;
}

// Query rows of one segment, or of all that share a prefix, against one KV head: all their keys, or the chunks
// [chunk_begin, chunk_end) of a cut.
struct AttentionItem {
  int32_t segment, kv_head, first_row, num_rows;
  int64_t first_chunk, num_chunks;  // that the rows can meet, behind those of a shared prefix
  int64_t chunk_begin, chunk_end;
  int64_t cost;
  int64_t partial = -1;         // of a cut: float offset of its partial results; -1: not cut
  int32_t prefix = -1;          // the ReadTogether whose rows these are
  int64_t shared_partial = -1;  // of a segment behind a shared prefix: float offset of its rows' results there
  int64_t shared_chunks = 0;
};

// Decoding segments whose first chunks are in the same pages: what is read once is multiplied with the rows of all.
struct ReadTogether : SharedPrefix {
  std::vector<int32_t> tokens;  // of each segment
};

}  // namespace

struct CpuRunner::Impl {
  Program program;
  std::shared_ptr<WeightStore> weights;
  CpuRunnerConfig config;
  const KernelTable* kernels;
  ThreadPool pool;
  Arena arena;
  std::vector<KvLayout> layouts;     // [group], of one layer
  std::vector<HugeBuffer> kv;        // [group]: [layer][page]
  HugeBuffer qkv_scratch;            // f32 [max_step_tokens][widest qkv]
  std::vector<HugeBuffer> attention_scratch;  // [thread]
  std::vector<std::vector<float>> sampler_scratch;  // [thread]
  std::vector<std::vector<ReadTogether>> shared_prefixes;  // [group], of this step
  std::vector<AttentionItem> attention_items;
  std::vector<AttentionItem> attention_cuts;  // uncut forms of those that were cut, to be merged
  HugeBuffer attention_partials;
  // [node]: of a gather node f32 [max_rows][cols], the hidden states of rows that draw under a mask, for when it is late.
  std::vector<std::vector<float>> hold;

  bool tap_logits = false;
  std::vector<LogitTap> taps;
  int32_t stop_after = -1;  // node index
  bool stopped = false;     // ... reached in this step
  bool time_nodes = false;
  std::vector<NodeTime> times;
  int64_t last_tokens = 0, last_logit_rows = 0;  // rows in use: of T values, and of L values in the last head block

  Impl(Program p, std::shared_ptr<WeightStore> w, CpuRunnerConfig c)
      : program(std::move(p)),
        weights(std::move(w)),
        config(std::move(c)),
        kernels(Validate(program, weights.get(), config)),
        pool(config.num_threads > 0 ? config.num_threads : UsableCpus(), config.nice),
        arena(program, config.max_step_tokens, kLogitBlock, config.debug),
        hold(program.nodes.size()) {
    for (size_t g = 0; g < config.groups.size(); ++g) {
      const DType kv_dtype = config.int8_kv ? DType::kI8 : program.act;
      layouts.push_back({kv_dtype, config.groups[g].page_size, config.num_kv_heads, config.head_dim});
      kv.emplace_back(layer_bytes(g) * config.groups[g].num_layers);
    }
    size_t qkv_bytes = 0, attention_bytes = 0;
    for (const NodeDesc& node : program.nodes) {
      if (node.op == OpKind::kQkv) qkv_bytes = std::max(qkv_bytes, QkvCols(node) * sizeof(float));
      if (node.op == OpKind::kAttention) {
        const auto group_size = static_cast<int32_t>(node.ints[0] / node.ints[1]);
        const auto head_dim = static_cast<int32_t>(node.ints[2]);
        attention_bytes = std::max(attention_bytes, AttentionScratchBytes(group_size, head_dim));
      }
      times.push_back({node.name, 0, 0});
    }
    qkv_scratch = HugeBuffer(qkv_bytes * config.max_step_tokens);
    for (int32_t t = 0; t < pool.num_threads(); ++t) {
      attention_scratch.emplace_back(attention_bytes);
      sampler_scratch.emplace_back(static_cast<size_t>(SamplerScratch(program.vocab_size)));
    }
  }

  // Before any member that trusts them is built.
  static const KernelTable* Validate(const Program& program, const WeightStore* weights,
                                     const CpuRunnerConfig& config) {
    SAPWOOD_REQUIRE(weights != nullptr, "weights must not be null");
    SAPWOOD_REQUIRE(!config.groups.empty(), "a CPU runner needs at least one KV group");
    SAPWOOD_REQUIRE(config.num_pages.size() == config.groups.size(), "num_pages must have one entry per KV group, got ",
                    config.num_pages.size(), " for ", config.groups.size(), " groups");
    for (size_t g = 0; g < config.groups.size(); ++g) {
      const KvGroup& group = config.groups[g];
      SAPWOOD_REQUIRE(group.kind == KvKind::kFull || group.kind == KvKind::kWindow, "KV group ", g,
                      ": the CPU runner has full and window groups, got kind ", static_cast<int>(group.kind));
      SAPWOOD_REQUIRE(group.page_size == 16 || group.page_size == 32 || group.page_size == 64, "KV group ", g,
                      ": page_size must be 16, 32 or 64 on a CPU, got ", group.page_size);
      SAPWOOD_REQUIRE(group.num_layers > 0 && config.num_pages[g] > 0, "KV group ", g,
                      ": num_layers and num_pages must be positive, got ", group.num_layers, " and ",
                      config.num_pages[g]);
    }
    SAPWOOD_REQUIRE(config.num_kv_heads > 0 && config.head_dim > 0, "num_kv_heads and head_dim must be positive, got ",
                    config.num_kv_heads, " and ", config.head_dim);
    SAPWOOD_REQUIRE(config.max_step_tokens > 0, "max_step_tokens must be positive, got ", config.max_step_tokens);
    SAPWOOD_REQUIRE(IsaSupported(config.isa), "this machine or build has no ", IsaName(config.isa), "; the best level is ",
                    IsaName(BestIsa()));
    CheckProgram(program, {&config.groups, config.num_kv_heads, config.head_dim});
    SAPWOOD_REQUIRE(weights->act() == program.act, "weights and program must have one act dtype");
    SAPWOOD_REQUIRE(weights->size() >= program.num_weight_slots, "the program names ", program.num_weight_slots,
                    " weight slots, the store has ", weights->size());
    CheckWeights(program, *weights);
    return &Kernels(config.isa);
  }

  static size_t QkvCols(const NodeDesc& node) {
    return static_cast<size_t>((node.ints[0] + 2 * node.ints[1]) * node.ints[2]);
  }
  size_t layer_bytes(size_t g) const { return layouts[g].page_bytes() * config.num_pages[g]; }
  char* layer(int64_t g, int64_t l) const { return static_cast<char*>(kv[g].data()) + l * layer_bytes(g); }
  const float* vector(int32_t slot) const {
    return slot < 0 ? nullptr : static_cast<const float*>(weights->slot(slot).data);
  }

  // --- Phases -----------------------------------------------------------------------------------------------------

  // fn(row) for every row, `grain` rows a tile.
  template <typename F>
  void ForRows(int64_t num_rows, int64_t grain, F fn) {
    pool.ParallelFor(CeilDiv(num_rows, grain), [&](int64_t tile, int32_t) {
      const int64_t end = std::min(num_rows, (tile + 1) * grain);
      for (int64_t row = tile * grain; row < end; ++row) fn(row);
    });
  }

  void Gemm(const GemmArgs& args, int64_t m) {
    const bool gate_up = args.epilogue == Epilogue::kSiluMul || args.epilogue == Epilogue::kSiluMulQ8;
    const int64_t panels = CeilDiv(args.n, gate_up ? kPanel / 2 : kPanel);
    // Few rows: all of them in every tile, so that each panel is read from memory once.
    const int64_t row_blocks = m <= 2 * kGemmRows ? 1 : CeilDiv(m, kGemmRows);
    const int64_t rows = CeilDiv(m, row_blocks);
    if (row_blocks == 1) {
      pool.ParallelForRuns(panels, kPanelsPerRun, [&](int64_t p0, int64_t p1, int32_t) {
        kernels->gemm(program.act, args, 0, m, p0, p1);
      });
      return;
    }
    // Row blocks innermost: neighbours in time share panels in the cache.
    const int64_t wanted = kTilesPerThread * pool.num_threads();
    const int64_t width = std::clamp<int64_t>(panels * row_blocks / wanted, 1, kPanelsPerRun);
    pool.ParallelForRuns(row_blocks * CeilDiv(panels, width), 1, [&](int64_t tile, int64_t, int32_t) {
      const int64_t m0 = tile % row_blocks * rows, p0 = tile / row_blocks * width;
      kernels->gemm(program.act, args, m0, std::min(m, m0 + rows), p0, std::min(panels, p0 + width));
    });
  }

  // Elements of a row, or blocks of one in q8.
  int64_t leading(int32_t value) const {
    const ValueDesc& desc = program.values[value];
    return desc.dtype == DType::kQ8 ? Q8Blocks(desc.cols) : desc.cols;
  }

  GemmArgs LinearArgs(const NodeDesc& node, Epilogue epilogue) const {
    const WeightSlot& w = weights->slot(node.weights[0]);
    GemmArgs args{};
    args.a = arena.value(node.inputs[0]);
    args.lda = leading(node.inputs[0]);
    args.w = w.data;
    args.format = w.format;
    args.bias = node.weights.size() > 1 ? vector(node.weights[1]) : nullptr;
    args.n = w.rows;
    args.k = w.cols;
    args.scale = 1.0f;
    args.epilogue = epilogue;
    if (!node.outputs.empty()) {
      args.out = arena.value(node.outputs[0]);
      args.ldc = leading(node.outputs[0]);
    }
    return args;
  }

  void Qkv(const NodeDesc& node, const StepBatch& batch) {
    const auto hq = static_cast<int32_t>(node.ints[0]);
    const int64_t group = node.ints[4];
    const auto rotary_dim = static_cast<int32_t>(node.ints[3]);
    const auto cols = static_cast<int64_t>(QkvCols(node));
    GemmArgs args = LinearArgs(node, Epilogue::kStoreF32);
    args.out = qkv_scratch.data();
    args.ldc = cols;
    Gemm(args, batch.num_tokens);

    const KvLayout& layout = layouts[group];
    char* const base = layer(group, node.ints[5]);
    const int64_t max_pos = weights->slot(node.weights[4]).rows / node.ints[6];
    const float* const cos = vector(node.weights[4]);
    const float* const sin = vector(node.weights[5]);
    char* const q = static_cast<char*>(arena.value(node.outputs[0]));
    const size_t q_row = arena.row_bytes(node.outputs[0]);
    const int64_t* const slots = batch.slots[group].data();
    const int64_t grain = std::clamp<int64_t>(batch.num_tokens / (4 * pool.num_threads()), 1, 8);
    ForRows(batch.num_tokens, grain, [&](int64_t t) {
      const int64_t row = batch.segments[batch.token_segment[t]].rope_mode * max_pos + batch.positions[t];
      RopeKvArgs rope{};
      rope.qkv = static_cast<const float*>(qkv_scratch.data()) + t * cols;
      rope.num_q_heads = hq;
      rope.q_norm = vector(node.weights[2]);
      rope.k_norm = vector(node.weights[3]);
      rope.norm_eps = static_cast<float>(node.floats[0]);
      rope.cos = cos + row * (rotary_dim / 2);
      rope.sin = sin + row * (rotary_dim / 2);
      rope.rotary_dim = rotary_dim;
      rope.q_out = q + t * q_row;
      rope.layout = layout;
      rope.page = base + slots[t] / layout.page_size * layout.page_bytes();
      rope.offset = static_cast<int32_t>(slots[t] % layout.page_size);
      kernels->rope_kv(program.act, rope);
    });
  }

  // Of decoding segments: a chunk that holds a row's own token is not shared.
  void FindPrefixes(const StepBatch& batch) {
    shared_prefixes.assign(layouts.size(), {});
    for (size_t g = 0; g < layouts.size(); ++g) {
      if (config.groups[g].kind != KvKind::kFull) continue;
      std::vector<PrefixReader> readers;
      for (size_t s = 0; s < batch.segments.size(); ++s) {
        const Segment& segment = batch.segments[s];
        if (segment.q_len == 1) readers.push_back({static_cast<int32_t>(s), batch.page_tables[g][s], segment.kv_len - 1});
      }
      for (SharedPrefix& found : FindSharedPrefixes(std::move(readers), layouts[g].page_size, kAttentionChunk)) {
        ReadTogether prefix{std::move(found), {}};
        for (int32_t s : prefix.segments) prefix.tokens.push_back(batch.segments[s].q_begin);
        shared_prefixes[g].push_back(std::move(prefix));
      }
    }
  }

  void PlanAttention(const NodeDesc& node, const StepBatch& batch) {
    const int64_t group = node.ints[3], window = node.ints[5];
    const auto num_kv_heads = static_cast<int32_t>(node.ints[1]);
    const auto group_size = static_cast<int32_t>(node.ints[0] / node.ints[1]);
    const auto partial_floats = static_cast<int64_t>(AttentionPartialFloats(static_cast<int32_t>(node.ints[2])));
    const int32_t queries = std::max(1, kAttentionRows / group_size);
    attention_items.clear();
    attention_cuts.clear();
    int64_t total_cost = 0, partials = 0;
    // Room for the partial results of rows x chunks, or -1 where there is none.
    const auto take = [&](int64_t rows, int64_t chunks) {
      const int64_t floats = rows * group_size * chunks * partial_floats;
      if (static_cast<size_t>(partials + floats) * sizeof(float) > kMaxPartialBytes) return int64_t{-1};
      partials += floats;
      return partials - floats;
    };

    struct Behind {  // what a segment has of a shared prefix; head h's results are h * head_floats further
      int64_t chunks = 0, partial = -1, head_floats = 0;
      int64_t own_partial = -1;  // of the chunks behind it
    };
    std::vector<Behind> behind(batch.segments.size());
    const auto num_chunks = [&](int32_t s) { return CeilDiv(batch.segments[s].kv_len, kAttentionChunk); };
    const std::vector<ReadTogether>& prefixes = shared_prefixes[group];
    for (size_t p = 0; window == 0 && p < prefixes.size(); ++p) {
      const ReadTogether& prefix = prefixes[p];
      const auto rows = static_cast<int32_t>(prefix.segments.size());
      int64_t own_chunks = 0;
      for (int32_t s : prefix.segments) own_chunks += num_chunks(s) - prefix.chunks;
      const int64_t room = take(num_kv_heads, rows * prefix.chunks + own_chunks);
      if (room < 0) continue;  // each for itself
      const int64_t row_floats = group_size * prefix.chunks * partial_floats, head_floats = rows * row_floats;
      int64_t own_partial = room + num_kv_heads * head_floats;
      for (int32_t i = 0; i < rows; ++i) {
        const int32_t s = prefix.segments[i];
        behind[s] = {prefix.chunks, room + i * row_floats, head_floats, own_partial};
        own_partial += num_kv_heads * (num_chunks(s) - prefix.chunks) * group_size * partial_floats;
      }
      // A few rows cost what reading costs, more of them what multiplying does.
      const int64_t cost = prefix.chunks * kAttentionChunk * (1 + rows / kRowsPerReading);
      total_cost += cost * num_kv_heads;
      for (int32_t head = 0; head < num_kv_heads; ++head) {
        attention_items.push_back({.segment = prefix.segments[0], .kv_head = head, .first_row = 0, .num_rows = rows,
                                   .first_chunk = 0, .num_chunks = prefix.chunks, .chunk_begin = 0,
                                   .chunk_end = prefix.chunks, .cost = cost, .partial = room + head * head_floats,
                                   .prefix = static_cast<int32_t>(p)});
      }
    }
    for (size_t s = 0; s < batch.segments.size(); ++s) {
      const Segment& segment = batch.segments[s];
      for (int32_t first = 0; first < segment.q_len; first += queries) {
        const int32_t rows = std::min(queries, segment.q_len - first);
        const int64_t hi = segment.kv_len - segment.q_len + first + rows;
        const int64_t lo = std::max(window > 0 ? std::max<int64_t>(0, hi - rows + 1 - window) : 0,
                                    behind[s].chunks * kAttentionChunk);
        const int64_t first_chunk = lo / kAttentionChunk, end_chunk = CeilDiv(hi, kAttentionChunk);
        const int64_t cost = rows * (hi - lo);
        total_cost += cost * num_kv_heads;
        for (int32_t head = 0; head < num_kv_heads; ++head) {
          AttentionItem item{.segment = static_cast<int32_t>(s), .kv_head = head, .first_row = first,
                             .num_rows = rows, .first_chunk = first_chunk, .num_chunks = end_chunk - first_chunk,
                             .chunk_begin = first_chunk, .chunk_end = end_chunk, .cost = cost};
          if (behind[s].chunks > 0) {
            item.shared_chunks = behind[s].chunks;
            item.shared_partial = behind[s].partial + head * behind[s].head_floats;
            item.partial = behind[s].own_partial + head * item.num_chunks * group_size * partial_floats;
            attention_cuts.push_back(item);
          }
          attention_items.push_back(item);
        }
      }
    }
    // Cut what is longer than its share; the absolute positions of the cuts are chunks', wherever they lie.
    const int64_t share = std::max<int64_t>(1, total_cost / (kTilesPerThread * pool.num_threads()));
    const size_t num_uncut = attention_items.size();
    for (size_t i = 0; pool.num_threads() > 1 && i < num_uncut; ++i) {
      AttentionItem item = attention_items[i];
      const int64_t least = item.prefix >= 0 ? 1 : kMinCutChunks;
      const int64_t pieces = std::min(CeilDiv(item.cost, share), item.num_chunks / least);
      if (pieces < 2) continue;
      if (item.partial < 0) {
        item.partial = take(item.num_rows, item.num_chunks);
        if (item.partial < 0) continue;
        attention_cuts.push_back(item);
      }
      const int64_t length = CeilDiv(item.num_chunks, pieces), end_chunk = item.chunk_end;
      item.cost = CeilDiv(item.cost, pieces);
      item.chunk_end = item.chunk_begin + length;
      attention_items[i] = item;
      while (item.chunk_end < end_chunk) {
        item.chunk_begin = item.chunk_end;
        item.chunk_end = std::min(end_chunk, item.chunk_begin + length);
        attention_items.push_back(item);
      }
    }
    const size_t bytes = static_cast<size_t>(partials) * sizeof(float);
    if (attention_partials.size() < bytes) attention_partials = HugeBuffer(bytes);
    // Longest first: what is left when the other threads run out of items is short.
    std::stable_sort(attention_items.begin(), attention_items.end(),
                     [](const AttentionItem& a, const AttentionItem& b) { return a.cost > b.cost; });
  }

  void Attention(const NodeDesc& node, const StepBatch& batch) {
    PlanAttention(node, batch);
    const int64_t group = node.ints[3];
    AttentionArgs common{};
    common.layout = layouts[group];
    common.kv = layer(group, node.ints[4]);
    common.q = arena.value(node.inputs[0]);
    common.out = arena.value(node.outputs[0]);
    common.ldq = program.values[node.inputs[0]].cols;
    common.ldo = program.values[node.outputs[0]].cols;
    common.num_q_heads = static_cast<int32_t>(node.ints[0]);
    common.window = static_cast<int32_t>(node.ints[5]);
    common.scale = static_cast<float>(node.floats[0]);
    common.softcap = static_cast<float>(node.floats[1]);
    const auto run = [&](const std::vector<AttentionItem>& items, auto kernel) {
      pool.ParallelFor(static_cast<int64_t>(items.size()), [&](int64_t tile, int32_t thread) {
        const AttentionItem& item = items[tile];
        const Segment& segment = batch.segments[item.segment];
        AttentionArgs args = common;
        args.page_table = batch.page_tables[group][item.segment];
        args.kv_head = item.kv_head;
        args.q_begin = segment.q_begin + item.first_row;
        args.q_len = item.num_rows;
        args.first_position = segment.kv_len - segment.q_len + item.first_row;
        args.scratch = attention_scratch[thread].data();
        float* const results = static_cast<float*>(attention_partials.data());
        if (item.partial >= 0) args.partial = results + item.partial;
        if (item.prefix >= 0) args.tokens = shared_prefixes[group][item.prefix].tokens.data();
        if (item.shared_partial >= 0) args.shared = results + item.shared_partial;
        args.shared_chunks = item.shared_chunks;
        args.first_chunk = item.first_chunk;
        args.num_chunks = item.num_chunks;
        args.chunk_begin = item.chunk_begin;
        args.chunk_end = item.chunk_end;
        kernel(program.act, args);
      });
    };
    run(attention_items, kernels->attention);
    if (!attention_cuts.empty()) run(attention_cuts, kernels->attention_merge);
  }

  // m: rows of the node's outputs. l0: the first logit row of the head block.
  void RunNode(const NodeDesc& node, const StepBatch& batch, int64_t m, int64_t l0) {
    switch (node.op) {
      case OpKind::kEmbedding: {
        const WeightSlot& table = weights->slot(node.weights[0]);
        const size_t row_bytes = static_cast<size_t>(table.cols) * DTypeBytes(program.act);
        float* const out = static_cast<float*>(arena.value(node.outputs[0]));
        ForRows(m, 16, [&](int64_t t) {
          kernels->embed(program.act, static_cast<const char*>(table.data) + batch.tokens[t] * row_bytes,
                         out + t * table.cols, table.cols, static_cast<float>(node.floats[0]));
        });
        break;
      }
      case OpKind::kRmsNorm: {
        const int64_t h = program.values[node.inputs[0]].cols;
        const float* const x = static_cast<const float*>(arena.value(node.inputs[0]));
        char* const y = static_cast<char*>(arena.value(node.outputs[0]));
        const size_t y_row = arena.row_bytes(node.outputs[0]);
        const float* const w = vector(node.weights[0]);
        const DType dtype = program.values[node.outputs[0]].dtype;
        ForRows(m, 8, [&](int64_t t) {
          kernels->rms_norm(dtype, x + t * h, w, y + t * y_row, h, static_cast<float>(node.floats[0]),
                            node.ints[0] != 0);
        });
        break;
      }
      case OpKind::kQuantize: {
        const int64_t cols = program.values[node.inputs[0]].cols;
        const char* const x = static_cast<const char*>(arena.value(node.inputs[0]));
        char* const y = static_cast<char*>(arena.value(node.outputs[0]));
        const size_t x_row = arena.row_bytes(node.inputs[0]), y_row = arena.row_bytes(node.outputs[0]);
        ForRows(m, 8, [&](int64_t t) {
          kernels->quantize(program.act, x + t * x_row, reinterpret_cast<Q8Block*>(y + t * y_row), cols);
        });
        break;
      }
      case OpKind::kQkv:
        Qkv(node, batch);
        break;
      case OpKind::kAttention:
        Attention(node, batch);
        break;
      case OpKind::kLinear:
        Gemm(LinearArgs(node, Epilogue::kStoreAct), m);
        break;
      case OpKind::kLinearResidual: {
        GemmArgs args = LinearArgs(node, Epilogue::kResidual);
        args.residual = static_cast<const float*>(arena.value(node.inputs[1]));
        Gemm(args, m);
        break;
      }
      case OpKind::kGateUp: {
        const bool q8 = program.values[node.outputs[0]].dtype == DType::kQ8;
        GemmArgs args = LinearArgs(node, q8 ? Epilogue::kSiluMulQ8 : Epilogue::kSiluMul);
        args.bias = nullptr;
        Gemm(args, m);
        break;
      }
      case OpKind::kGatherLogitRows: {
        const int64_t cols = program.values[node.outputs[0]].cols;
        const float* const x = static_cast<const float*>(arena.value(node.inputs[0]));
        float* const out = static_cast<float*>(arena.value(node.outputs[0]));
        float* const kept = hold[&node - program.nodes.data()].data();
        for (int64_t i = 0; i < m; ++i) {
          const int32_t src = batch.logit_src[l0 + i];
          const int64_t row = batch.segments[batch.logit_segment[l0 + i]].row;
          std::copy_n(src >= 0 ? x + src * cols : kept + row * cols, cols, out + i * cols);
          // Before anybody knows whether the mask will be there: x may be overwritten by then.
          if (src >= 0 && batch.logit_masked[l0 + i]) std::copy_n(x + src * cols, cols, kept + row * cols);
        }
        break;
      }
      case OpKind::kLmHead: {
        GemmArgs args = LinearArgs(node, Epilogue::kLogits);
        args.bias = nullptr;
        args.scale = static_cast<float>(node.floats[0]);
        args.softcap = static_cast<float>(node.floats[1]);
        args.block_max = static_cast<float*>(arena.value(node.outputs[1]));
        Gemm(args, m);
        break;
      }
      case OpKind::kSample:
        SAPWOOD_CHECK(false, "sample nodes run in Sample");
    }
  }

  void Sample(const NodeDesc& node, const StepBatch& batch, const RowTable& rows, int64_t m, int64_t l0,
              std::span<SampledToken> out) {
    const float* const logits = static_cast<const float*>(arena.value(node.inputs[0]));
    const float* const block_max = static_cast<const float*>(arena.value(node.inputs[1]));
    const int64_t vocab = program.vocab_size, blocks = program.values[node.inputs[1]].cols;
    if (tap_logits) {
      for (int64_t i = 0; i < m; ++i) {
        const int32_t row = batch.segments[batch.logit_segment[l0 + i]].row;
        const float* const begin = logits + i * vocab;
        taps.push_back({batch.step_id, row, rows.row(row).gen, batch.logit_position[l0 + i],
                        std::vector<float>(begin, begin + vocab)});
      }
    }
    pool.ParallelFor(m, [&](int64_t i, int32_t thread) {
      out[l0 + i] = SampleLogitRow(batch, rows, static_cast<int32_t>(l0 + i), logits + i * vocab,
                                   block_max + i * blocks, static_cast<int32_t>(vocab), sampler_scratch[thread].data());
    });
  }

  // The nodes of one segment kind, for m rows. False once the node to stop after has run.
  template <typename F>
  void RunSegment(SegmentKind kind, F run) {
    for (size_t n = 0; n < program.nodes.size() && !stopped; ++n) {
      const NodeDesc& node = program.nodes[n];
      if (node.segment != kind) continue;
      if (time_nodes) {
        const int64_t begin = NowNs();
        run(node);
        times[n].total_ns += NowNs() - begin;
        ++times[n].calls;
      } else {
        run(node);
      }
      if (config.debug) {
        const std::string broken = arena.CheckGuards(last_tokens, last_logit_rows);
        SAPWOOD_CHECK(broken.empty(), "node \"", node.name, "\" (", OpName(node.op), ") overwrote ", broken);
      }
      if (static_cast<int32_t>(n) == stop_after) stopped = true;
    }
  }

  // What a step begins with, be it by its forward or, without tokens, by its head.
  void BeginStep(const StepBatch& batch, const RowTable& rows) {
    stopped = false;
    last_tokens = last_logit_rows = 0;
    CheckWeights(program, *weights);
    CheckBatch(batch, rows);
    arena.Poison(RowSym::kT);
    arena.Poison(RowSym::kL);
    last_tokens = batch.num_tokens;
    if (std::find(batch.logit_masked.begin(), batch.logit_masked.end(), 1) == batch.logit_masked.end()) return;
    for (size_t n = 0; n < program.nodes.size(); ++n) {
      const NodeDesc& node = program.nodes[n];
      if (node.op != OpKind::kGatherLogitRows) continue;
      hold[n].resize(static_cast<size_t>(program.values[node.outputs[0]].cols) * rows.max_rows());
    }
  }

  // What tiles index with. A tile must not throw, and a wild index would write into another row's KV.
  void CheckBatch(const StepBatch& batch, const RowTable& rows) const {
    const int64_t num_tokens = batch.num_tokens;
    SAPWOOD_REQUIRE(num_tokens <= config.max_step_tokens, "step ", batch.step_id, " has ", num_tokens,
                    " tokens; the runner was made for max_step_tokens = ", config.max_step_tokens);
    SAPWOOD_CHECK(batch.slots.size() == layouts.size() && rows.groups().size() == layouts.size(), "the rows have ",
                  batch.slots.size(), " KV groups, the runner ", layouts.size());
    for (size_t g = 0; g < layouts.size(); ++g) {
      SAPWOOD_CHECK(rows.groups()[g].page_size == layouts[g].page_size, "KV group ", g, " has pages of ",
                    rows.groups()[g].page_size, " in the rows and ", layouts[g].page_size, " here");
      const int64_t num_slots = int64_t{config.num_pages[g]} * layouts[g].page_size;
      for (int64_t t = 0; t < num_tokens; ++t) {
        const int64_t slot = batch.slots[g][t];
        SAPWOOD_CHECK(slot >= 0 && slot < num_slots, "token ", t, " goes to slot ", slot, " of KV group ", g,
                      ", which has ", num_slots);
      }
    }
    for (const NodeDesc& node : program.nodes) {
      if (node.op == OpKind::kEmbedding) {
        const int64_t num_rows = weights->slot(node.weights[0]).rows;
        for (int64_t t = 0; t < num_tokens; ++t) {
          SAPWOOD_REQUIRE(batch.tokens[t] >= 0 && batch.tokens[t] < num_rows, "token id ", batch.tokens[t],
                          " is not in the embedding table of ", num_rows, " rows");
        }
      }
      if (node.op == OpKind::kQkv) {
        const int64_t max_pos = weights->slot(node.weights[4]).rows / node.ints[6];
        for (const Segment& s : batch.segments) {
          SAPWOOD_REQUIRE(s.kv_len <= max_pos, "row ", s.row, " reaches ", s.kv_len,
                          " tokens; the rope table of node \"", node.name, "\" ends at ", max_pos);
          SAPWOOD_REQUIRE(s.rope_mode >= 0 && s.rope_mode < node.ints[6], "row ", s.row, " has rope mode ", s.rope_mode,
                          "; node \"", node.name, "\" has ", node.ints[6]);
        }
      }
    }
    for (size_t g = 0; config.debug && g < layouts.size(); ++g) {
      const KvGroup& group = config.groups[g];
      for (size_t s = 0; s < batch.segments.size(); ++s) {
        const Segment& segment = batch.segments[s];
        const int64_t lo = group.kind == KvKind::kWindow ? segment.kv_len - segment.q_len + 1 - group.window : 0;
        for (int64_t p = std::max<int64_t>(0, lo) / group.page_size; p <= (segment.kv_len - 1) / group.page_size; ++p) {
          const PageId page = batch.page_tables[g][s][p];
          SAPWOOD_CHECK(page >= 0 && page < config.num_pages[g], "page ", p, " of row ", segment.row, " in KV group ",
                        g, " is ", page, " of ", config.num_pages[g]);
        }
      }
    }
  }
};

CpuRunner::CpuRunner(Program program, std::shared_ptr<WeightStore> weights, CpuRunnerConfig config)
    : impl_(std::make_unique<Impl>(std::move(program), std::move(weights), std::move(config))) {}

CpuRunner::~CpuRunner() = default;

void CpuRunner::CopyPages(std::span<const PageCopy> copies) {
  Impl& im = *impl_;
  for (const PageCopy& copy : copies) {
    SAPWOOD_CHECK(copy.group >= 0 && copy.group < static_cast<int32_t>(im.layouts.size()), "copy in KV group ",
                  copy.group);
    const int32_t num_pages = im.config.num_pages[copy.group];
    SAPWOOD_CHECK(copy.src >= 0 && copy.src < num_pages && copy.dst >= 0 && copy.dst < num_pages, "copy of page ",
                  copy.src, " to ", copy.dst, " in a pool of ", num_pages);
    const size_t bytes = im.layouts[copy.group].page_bytes();
    // In order, copy after copy: one may read what an earlier one wrote.
    im.pool.ParallelFor(im.config.groups[copy.group].num_layers, [&](int64_t l, int32_t) {
      char* const base = im.layer(copy.group, l);
      std::memmove(base + copy.dst * bytes, base + copy.src * bytes, bytes);
    });
  }
}

void CpuRunner::Forward(const StepBatch& batch, const RowTable& rows) {
  Impl& im = *impl_;
  const ScopedFpMode fp_mode;
  im.BeginStep(batch, rows);
  if (batch.num_tokens == 0) return;
  im.FindPrefixes(batch);
  im.RunSegment(SegmentKind::kForward, [&](const NodeDesc& node) { im.RunNode(node, batch, batch.num_tokens, 0); });
}

void CpuRunner::Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) {
  Impl& im = *impl_;
  const ScopedFpMode fp_mode;
  const auto num_rows = static_cast<int64_t>(batch.logit_src.size());
  SAPWOOD_CHECK(static_cast<int64_t>(out.size()) == num_rows, out.size(), " outputs for ", num_rows, " logit rows");
  if (batch.num_tokens == 0) im.BeginStep(batch, rows);
  const bool stopped_before = im.stopped;
  for (int64_t l0 = 0; l0 < num_rows; l0 += kLogitBlock) {
    const int64_t m = std::min<int64_t>(kLogitBlock, num_rows - l0);
    im.stopped = stopped_before;
    im.last_logit_rows = m;
    im.arena.Poison(RowSym::kL);
    im.RunSegment(SegmentKind::kHead, [&](const NodeDesc& node) { im.RunNode(node, batch, m, l0); });
    im.RunSegment(SegmentKind::kSample, [&](const NodeDesc& node) { im.Sample(node, batch, rows, m, l0, out); });
  }
}

int32_t CpuRunner::vocab_size() const { return impl_->program.vocab_size; }

size_t CpuRunner::kv_bytes() const {
  size_t total = 0;
  for (const HugeBuffer& buffer : impl_->kv) total += buffer.size();
  return total;
}

ThreadPool& CpuRunner::pool() { return impl_->pool; }

void CpuRunner::TapLogits(bool on) { impl_->tap_logits = on; }

std::vector<LogitTap> CpuRunner::TakeLogits() { return std::exchange(impl_->taps, {}); }

std::vector<uint8_t> CpuRunner::ReadKv(int32_t group, int32_t layer_in_group, PageId page, int32_t offset) const {
  const Impl& im = *impl_;
  SAPWOOD_REQUIRE(group >= 0 && group < static_cast<int32_t>(im.layouts.size()), "group must be in 0..",
                  im.layouts.size() - 1, ", got ", group);
  const KvGroup& g = im.config.groups[group];
  SAPWOOD_REQUIRE(layer_in_group >= 0 && layer_in_group < g.num_layers, "layer_in_group must be in 0..",
                  g.num_layers - 1, ", got ", layer_in_group);
  SAPWOOD_REQUIRE(page >= 0 && page < im.config.num_pages[group], "page must be in 0..", im.config.num_pages[group] - 1,
                  ", got ", page);
  SAPWOOD_REQUIRE(offset >= 0 && offset < g.page_size, "offset must be in 0..", g.page_size - 1, ", got ", offset);
  const KvLayout& layout = im.layouts[group];
  const DType canonical = layout.dtype == DType::kI8 ? DType::kF32 : layout.dtype;
  const size_t half = static_cast<size_t>(layout.num_kv_heads) * layout.head_dim * DTypeBytes(canonical);
  std::vector<uint8_t> out(2 * half);
  const char* const base = im.layer(group, layer_in_group) + page * layout.page_bytes();
  ReadKvToken(layout, base, offset, out.data(), out.data() + half);
  return out;
}

void CpuRunner::PoisonKv() {
  for (const HugeBuffer& buffer : impl_->kv) std::memset(buffer.data(), 0xff, buffer.size());
}

void CpuRunner::StopAfter(const std::string& node) {
  Impl& im = *impl_;
  im.stop_after = -1;
  if (node.empty()) return;
  for (size_t n = 0; n < im.program.nodes.size(); ++n) {
    if (im.program.nodes[n].name == node) im.stop_after = static_cast<int32_t>(n);
  }
  SAPWOOD_REQUIRE(im.stop_after >= 0, "the program has no node \"", node, "\"");
}

std::vector<uint8_t> CpuRunner::Dump(const std::string& node) const {
  const Impl& im = *impl_;
  for (size_t n = 0; n < im.program.nodes.size(); ++n) {
    const NodeDesc& desc = im.program.nodes[n];
    if (desc.name != node) continue;
    SAPWOOD_REQUIRE(!desc.outputs.empty(), "node \"", node, "\" (", OpName(desc.op), ") writes no value");
    SAPWOOD_REQUIRE(im.config.debug || im.stop_after == static_cast<int32_t>(n), "the value of node \"", node,
                    "\" may have been overwritten; make the runner with debug = true or StopAfter this node");
    const int32_t id = desc.outputs[0];
    const int64_t rows = im.program.values[id].rows == RowSym::kT ? im.last_tokens : im.last_logit_rows;
    const auto* begin = static_cast<const uint8_t*>(im.arena.value(id));
    return {begin, begin + rows * im.arena.row_bytes(id)};
  }
  throw InvalidArgument(StrCat("the program has no node \"", node, "\""));
}

void CpuRunner::TimeNodes(bool on) {
  impl_->time_nodes = on;
  if (!on) return;
  for (NodeTime& time : impl_->times) time.calls = time.total_ns = 0;
}

std::vector<NodeTime> CpuRunner::NodeTimes() const { return impl_->times; }

}  // namespace sapwood
