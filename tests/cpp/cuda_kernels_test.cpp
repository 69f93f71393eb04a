// The raw CUDA kernels, as the emulator runs them. The loss's go through the tests of kernels_test.cpp.
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "cuda/bag_embedding.h"
#include "cuda/loss_rows.h"
#include "emulated.h"
#include "stored.h"

namespace tst::cpu {
namespace {

template <typename T, int blocks, bool cached>
void run_loss_rows(const LossRows& in, int64_t begin, int64_t end) {
  using A = cuda::Acc<T>;
  const int64_t rows = end - begin, s = in.bag_size;
  const auto converted = [&](const double* values, int64_t count) {
    return values ? std::vector<A>(values, values + count) : std::vector<A>();
  };
  const std::vector<A> scale = converted(in.label_scale + begin * in.scale_stride, in.scale_stride ? rows * s : s);
  const std::vector<A> grad_loss = converted(in.grad_loss ? in.grad_loss + begin : nullptr, rows);
  const std::vector<A> grad_lse = converted(in.grad_lse ? in.grad_lse + begin : nullptr, rows);
  std::vector<A> loss(rows, -1), lse(rows, -1);
  cuda::LossRows<T> a{};
  a.logits = static_cast<T*>(in.logits) + begin * in.stride, a.rows = rows, a.stride = in.stride;
  a.vocabulary = static_cast<int>(in.vocabulary);
  a.labels = in.labels + begin * s, a.bag_size = static_cast<int>(s);
  a.label_scale = scale.data(), a.scale_stride = in.scale_stride, a.options = in.options;
  a.grad_loss = grad_loss.empty() ? nullptr : grad_loss.data(), a.grad_loss_stride = 1;
  a.grad_lse = grad_lse.empty() ? nullptr : grad_lse.data();
  a.loss = loss.data(), a.lse = lse.data();
  a.cache_bytes = cached && in.gradient ? static_cast<int>(cuda::slice_bytes<T>(in.vocabulary, blocks)) : 0;
  const bool plain = in.options.plain();
  constexpr unsigned kThreads = blocks > 1 || cached ? 96 : 192;  // 5 warps of columns: a lane joins the sums of two
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(rows, 2));  // which have three rows of five, and two
  emulator::launch({clusters * blocks, 1, 1}, kThreads, blocks,
                   static_cast<size_t>(cuda::loss_rows_memory<T>(s) + a.cache_bytes), [&] {
                     using cuda::Pass;
                     constexpr Pass kPass = cached ? Pass::kCachedGradient : Pass::kGradient;
                     if (in.gradient)
                       plain ? cuda::loss_rows_kernel<T, true, kPass>(a) : cuda::loss_rows_kernel<T, false, kPass>(a);
                     else
                       plain ? cuda::loss_rows_kernel<T, true, Pass::kLoss>(a)
                             : cuda::loss_rows_kernel<T, false, Pass::kLoss>(a);
                   });
  std::copy(loss.begin(), loss.end(), in.loss + begin);
  std::copy(lse.begin(), lse.end(), in.lse + begin);
}

// One way to cut a row has all dtypes, the others two, and under ThreadSanitizer one: each takes seconds to compile.
template <int blocks, bool cached, bool all = false>
std::array<LossRowsFn, kDTypes> cut() {
  std::array<LossRowsFn, kDTypes> table{};
  table[kFloat32] = run_loss_rows<float, blocks, cached>;
#if !defined(__SANITIZE_THREAD__)
  table[kBFloat16] = run_loss_rows<cuda::BFloat16, blocks, cached>;
  if constexpr (all) {
    table[kFloat16] = run_loss_rows<cuda::Float16, blocks, cached>;
    table[kFloat64] = run_loss_rows<double, blocks, cached>;
  }
#endif
  return table;
}

const std::map<std::string, std::array<LossRowsFn, kDTypes>> kEmulations = {
    {"cuda_read_twice", cut<1, false>()},
    {"cuda_cached", cut<1, true, true>()},
    {"cuda_cluster_of_4_cached", cut<4, true>()},
    {"cuda_cluster_of_2_read_twice", cut<2, false>()},
};

}  // namespace

std::vector<std::tuple<std::string, DType>> emulations() {
  std::vector<std::tuple<std::string, DType>> found;
  for (const auto& [name, table] : kEmulations) {
    for (size_t dtype = 0; dtype < table.size(); ++dtype) {
      if (table[dtype]) found.emplace_back(name, static_cast<DType>(dtype));
    }
  }
  return found;
}
bool is_emulated(const std::string& name) { return kEmulations.count(name) > 0; }
LossRowsFn emulated_loss_rows(const std::string& name, DType dtype) { return kEmulations.at(name)[dtype]; }

namespace {

// ---- bag embedding ----------------------------------------------------------------------------------------------

struct BagCase {
  int64_t bags, bag_size, rows, dim;
  bool mean, padded, positions;
  std::vector<int64_t> ids;
  std::vector<double> position_weights;

  double weight(int64_t place) const {
    if (padded && ids[place] == -1) return 0;
    return positions ? position_weights[place % bag_size] : 1;
  }
  double coefficient(int64_t place) const {
    const int64_t bag = place / bag_size;
    double total = 0;
    for (int64_t i = 0; i < bag_size; ++i) total += weight(bag * bag_size + i);
    return !mean ? weight(place) : total == 0 ? 0 : weight(place) / total;
  }
  bool weighted() const { return padded || positions; }
  cuda::Pooling pooling() const {
    return {static_cast<int>(bag_size), mean, padded, -1, positions ? position_weights.data() : nullptr};
  }
};

template <int n, int packs>
emulator::Dim grid_of(int64_t rows, int64_t dim) {
  constexpr int slab = cuda::kSlab<n, packs>;
  return {static_cast<unsigned>((rows + 3) / 4), static_cast<unsigned>((dim + slab - 1) / slab), 1};
}

template <typename T, int n, bool weighted>
void forward(const BagCase& c, const Stored& table, Stored& out) {
  const cuda::BagForward<T> a{c.ids.data(),
                              reinterpret_cast<const T*>(table.bytes.data()),
                              reinterpret_cast<T*>(out.bytes.data()),
                              c.bags,
                              c.rows,
                              c.dim,
                              c.pooling()};
  emulator::launch(grid_of<n, cuda::kForwardPacks>(c.bags, c.dim), 128, 1, 0,
                   [&] { cuda::bag_embedding_kernel<T, n, weighted>(a); });
}

template <typename T, int n, bool weighted>
void backward(const BagCase& c, const Stored& grad, Stored& out) {
  const int64_t count = c.bags * c.bag_size, windows = (count + cuda::kWindow - 1) / cuda::kWindow;
  std::vector<uint32_t> keys(count, 0xcdcdcdcd), places(count, 0xcdcdcdcd), sorted_keys(count), sorted_places(count);
  std::vector<double> scales(c.bags, NAN);
  std::vector<int> offsets(c.rows + 1, -1), longs(1 + windows, -1), order(count);
  using A = cuda::Acc<T>;
  const auto pieces = std::make_unique<emulator::Chunk[]>(2 * windows * c.dim * sizeof(A) / 16 + 2);
  std::memset(pieces.get(), 0xff, 2 * windows * c.dim * sizeof(A));  // NaN
  // Packs of pieces may be 32 bytes, as on the device.
  A* const aligned = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(pieces.get()) + 31) / 32 * 32);
  std::fill_n(aligned, 2 * windows * c.dim, static_cast<A>(NAN));
  const cuda::BagHits hits{c.ids.data(), c.bags,        c.rows,        c.pooling(),
                           keys.data(),  places.data(), scales.data(), longs.data()};
  emulator::launch({static_cast<unsigned>((c.bags + 31) / 32), 1, 1}, 32, 1, 0,
                   [&] { cuda::bag_hits_kernel<weighted>(hits); });
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] < keys[b]; });
  for (int64_t i = 0; i < count; ++i) sorted_keys[i] = keys[order[i]], sorted_places[i] = places[order[i]];
  emulator::launch({static_cast<unsigned>((c.rows + 32) / 32), 1, 1}, 32, 1, 0, [&] {
    cuda::bag_offsets_kernel(sorted_keys.data(), static_cast<int>(count), c.rows, offsets.data(), longs.data());
  });
  const cuda::BagBackward<T> a{reinterpret_cast<const T*>(grad.bytes.data()),
                               sorted_keys.data(),
                               sorted_places.data(),
                               offsets.data(),
                               longs.data(),
                               scales.data(),
                               reinterpret_cast<T*>(out.bytes.data()),
                               aligned,
                               2 * windows,
                               c.rows,
                               c.dim,
                               static_cast<int>(count),
                               c.pooling()};
  const int64_t groups = (c.rows + cuda::kRows - 1) / cuda::kRows;
  emulator::launch(grid_of<n, cuda::kBackwardPacks>(2 * windows + groups, c.dim), 128, 1, 0,
                   [&] { cuda::bag_rows_kernel<T, n, weighted>(a); });
  const emulator::Dim join{1, grid_of<n, 1>(1, c.dim).y, 1};  // a block has several rows
  emulator::launch(join, cuda::kJoinWarps * cuda::kWarp, 1, cuda::kJoinMemory<T, n>,
                   [&] { cuda::bag_join_kernel<T, n, weighted>(a); });
}

template <typename T>
void run(bool is_forward, bool vectors, const BagCase& c, const Stored& in, Stored& out) {
  constexpr int n = cuda::kPack<T>;
  const auto pick = [&](auto f1, auto f2, auto f3, auto f4) {
    (vectors ? (c.weighted() ? f1 : f2) : (c.weighted() ? f3 : f4))(c, in, out);
  };
  if (is_forward)
    pick(forward<T, n, true>, forward<T, n, false>, forward<T, 1, true>, forward<T, 1, false>);
  else
    pick(backward<T, n, true>, backward<T, n, false>, backward<T, 1, true>, backward<T, 1, false>);
}

void run(DType dtype, bool is_forward, bool vectors, const BagCase& c, const Stored& in, Stored& out) {
  switch (dtype) {
    case kFloat32:
      return run<float>(is_forward, vectors, c, in, out);
    case kBFloat16:
      return run<cuda::BFloat16>(is_forward, vectors, c, in, out);
    case kFloat16:
      return run<cuda::Float16>(is_forward, vectors, c, in, out);
    default:
      return run<double>(is_forward, vectors, c, in, out);
  }
}

class CudaBagTest : public testing::TestWithParam<DType> {
 protected:
  std::mt19937_64 random{7};
  double normal() { return std::normal_distribution<double>()(random); }

  BagCase make(int64_t bags, int64_t bag_size, int64_t rows, int64_t dim, int options) {
    BagCase c{bags, bag_size, rows, dim, bool(options & 1), bool(options & 2), bool(options & 4), {}, {}};
    for (int64_t i = 0; i < bag_size; ++i) c.position_weights.push_back(i == 1 ? 0 : (1.0 + random() % 4) / 4);
    for (int64_t p = 0; p < bags * bag_size; ++p) {
      // Two frequent ids side by side, one of them first, and a tail.
      const uint64_t kind = random() % 8;
      c.ids.push_back(kind < 2 ? 0 : kind < 4 ? std::min<int64_t>(1, rows - 1) : static_cast<int64_t>(random() % rows));
      if (c.padded && random() % 5 == 0) c.ids.back() = -1;
    }
    if (c.padded) std::fill_n(c.ids.begin(), bag_size, -1);  // a bag of nothing
    return c;
  }

  // Both directions against sums in float64, and with packs where rows have whole ones.
  void check(const BagCase& c) {
    const double accumulation = eps(GetParam() == kFloat64 ? kFloat64 : kFloat32);
    const int64_t bag_size = c.bag_size, dim = c.dim;
    const bool vectors = dim % 8 == 0;
    SCOPED_TRACE("options " + std::to_string(c.mean + 2 * c.padded + 4 * c.positions) + ", " + std::to_string(c.bags) +
                 "x" + std::to_string(bag_size) + " ids, " + std::to_string(c.rows) + "x" + std::to_string(dim));
    Stored table(GetParam(), c.rows * dim), grad(GetParam(), c.bags * dim);
    for (int64_t i = 0; i < c.rows * dim; ++i) table.set(i, normal());
    for (int64_t i = 0; i < c.bags * dim; ++i) grad.set(i, normal());
    std::vector<double> sum(c.bags * dim), size(c.bags * dim), grad_sum(c.rows * dim), grad_size(c.rows * dim);
    for (int64_t p = 0; p < c.bags * bag_size; ++p) {
      const double w = c.coefficient(p);
      for (int64_t k = 0; k < dim && w != 0; ++k) {
        const int64_t out = p / bag_size * dim + k, in = c.ids[p] * dim + k;
        sum[out] += w * table.get(in), size[out] += std::fabs(w * table.get(in));
        grad_sum[in] += w * grad.get(out), grad_size[in] += std::fabs(w * grad.get(out));
      }
    }
    for (const bool is_forward : {true, false}) {
      const std::vector<double>&wanted = is_forward ? sum : grad_sum, &sizes = is_forward ? size : grad_size;
      Stored out(GetParam(), wanted.size());
      run(GetParam(), is_forward, vectors, c, is_forward ? table : grad, out);
      // Sums of up to 513 terms, 200 one after another, in random walks; the weights are rounded too.
      for (size_t i = 0; i < wanted.size(); ++i) {
        ASSERT_NEAR(out.get(i), wanted[i],
                    eps(GetParam()) / 2 * std::fabs(wanted[i]) + 16 * accumulation * sizes[i] +
                        (GetParam() == kFloat16 ? 3e-8 : 0))
            << (is_forward ? "forward " : "backward ") << i;
      }
      if (vectors) {  // as one element at a time, bit for bit
        Stored single(GetParam(), wanted.size());
        run(GetParam(), is_forward, false, c, is_forward ? table : grad, single);
        ASSERT_EQ(single.bytes, out.bytes);
      }
    }
  }
};

TEST_P(CudaBagTest, ForwardAndBackward) {
  for (int options = 0; options < 8; ++options) {
    for (const auto& [bags, bag_size, rows] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
                                               {5, 3, 7},
                                               {64, 1, 1},
                                               {65, 1, 1},
                                               {130, 4, 40},
                                               {40, 16, 3}}) {
      for (const int64_t dim : {1, 8, 72, 520}) {
        if (dim == 520 && (bags != 130 || options % 3)) continue;  // two slabs
        if (once() && (options % 7 || dim == 8 || (bags != 65 && bags != 130))) continue;
        check(make(bags, bag_size, rows, dim, options));
      }
    }
  }
}

// Rows of as many hits, in any order of the batch.
TEST_P(CudaBagTest, RowsOfGivenHits) {
  const std::vector<std::vector<int>> cases = {
      {64, 65, 63, 0, 64, 129, 1, 0},                 // begin and end at a window and beside one
      {65, 448, 64, 70, 0, 513, 130},                 // a piece for each of 8 warps, two for 5, or few
      {0, 66, 65, 65, 65, 65, 65, 65, 65, 1, 0, 65},  // as many long rows as there can be, nearly
  };
  for (const std::vector<int>& hits : cases) {
    for (const int options : {0, 1, 7}) {
      if (once() && options == 1) continue;
      BagCase c = make(1, 1, static_cast<int64_t>(hits.size()), 8, options);
      c.ids.clear();
      for (size_t v = 0; v < hits.size(); ++v) c.ids.insert(c.ids.end(), hits[v], static_cast<int64_t>(v));
      if (c.padded) c.ids.insert(c.ids.end(), 150, -1);  // windows of padding alone
      std::shuffle(c.ids.begin(), c.ids.end(), random);
      c.bags = static_cast<int64_t>(c.ids.size());
      check(c);
    }
  }
}

TEST_P(CudaBagTest, IdsOutOfRangeStop) {
  for (const int64_t bad : {-1, 7}) {
    BagCase c = make(5, 3, 7, 8, 0);
    c.ids[11] = bad;
    Stored table(GetParam(), 7 * 8), grad(GetParam(), 5 * 8);
    for (int64_t i = 0; i < 40; ++i) table.set(i, 0), grad.set(i, 0);
    Stored out(GetParam(), 7 * 8);
    EXPECT_THROW(run(GetParam(), true, true, c, table, out), std::out_of_range);
    EXPECT_THROW(run(GetParam(), false, true, c, grad, out), std::out_of_range);
  }
}

TEST_P(CudaBagTest, RowsThatCountNothingAreNotRead) {
  BagCase c = make(1, 2, 3, 8, 4);
  c.ids = {2, 0};  // position 1 weighs 0
  Stored table(GetParam(), 3 * 8);
  for (int64_t i = 0; i < 24; ++i) table.set(i, i < 8 ? INFINITY : 1.0);
  Stored out(GetParam(), 8);
  run(GetParam(), true, true, c, table, out);
  for (int64_t i = 0; i < 8; ++i) EXPECT_EQ(out.get(i), c.position_weights[0]) << i;
}

TEST(CudaBagGatherTest, LastTermsOfAnInt) {
  constexpr int kEnd = std::numeric_limits<int>::max(), kBegin = kEnd - 40;
  std::vector<float> source(40), sums(32, NAN);
  std::iota(source.begin(), source.end(), 1.0f);
  emulator::launch({1, 1, 1}, 32, 1, 0, [&] {
    const auto term = [](int k) {
      if (k < kBegin || k >= kEnd) throw std::out_of_range("a term that there is not");
      return cuda::Term<float>{k - kBegin, 1};
    };
    float sum[1][1] = {};
    cuda::gather<false>(source.data(), 1, 0, kBegin, kEnd, term, sum);
    sums[cuda::lane()] = sum[0][0];
  });
  EXPECT_EQ(sums, std::vector<float>(32, 40 * 41 / 2));
}

#if defined(__SANITIZE_THREAD__)  // slow, and barriers are the same for all dtypes
INSTANTIATE_TEST_SUITE_P(All, CudaBagTest, testing::Values(kFloat32));
#else
INSTANTIATE_TEST_SUITE_P(All, CudaBagTest, testing::Values(kFloat32, kBFloat16, kFloat16, kFloat64));
#endif

TEST(CudaLossTest, LabelsOutOfRangeStop) {
  for (const int64_t bad : {-1, 5}) {
    std::vector<float> logits(5, 0);
    const double scale = 1;
    double loss = 0, lse = 0;
    LossRows args{};
    args.logits = logits.data(), args.stride = args.vocabulary = 5;
    args.labels = &bad, args.bag_size = 1, args.options.ignore_index = -100, args.label_scale = &scale;
    args.gradient = true, args.loss = &loss, args.lse = &lse;
    EXPECT_THROW(emulated_loss_rows("cuda_cached", kFloat32)(args, 0, 1), std::out_of_range);
    EXPECT_EQ(logits, std::vector<float>(5, 0)) << "nothing was written";
  }
}

TEST(CudaLossTest, NaNOfAThreadWithNothingElseShows) {
  alignas(16) float logits[12] = {0, 0, 0, 0, NAN, NAN, NAN, NAN, 0, 0, 0, 0};  // a thread has four columns
  const int64_t label = 0;
  const double scale = 1;
  double loss = 0, lse = 0;
  LossRows args{};
  args.logits = logits, args.stride = args.vocabulary = 12;
  args.labels = &label, args.bag_size = 1, args.options.ignore_index = -100, args.label_scale = &scale;
  args.loss = &loss, args.lse = &lse;
  emulated_loss_rows("cuda_cached", kFloat32)(args, 0, 1);
  EXPECT_TRUE(std::isnan(loss) && std::isnan(lse)) << loss << ", " << lse;
}

// ---- what the emulator would catch ---------------------------------------------------------------------------------

TEST(Emulator, BarrierThatNotAllReachIsAnError) {
  EXPECT_THROW(emulator::launch({1, 1, 1}, 64, 1, 0,
                                [] {
                                  if (threadIdx.x != 5) __syncthreads();
                                }),
               std::logic_error);
}

#if !defined(__SANITIZE_THREAD__)
TEST(Emulator, MemoryOfBlocksThatLeftIsPoisoned) {
  int seen = 0;
  const double* other = nullptr;
  emulator::launch({2, 1, 1}, 32, 2, sizeof(double), [&] {
    TST_SHARED_MEMORY(raw);
    double* memory = reinterpret_cast<double*>(raw);
    if (threadIdx.x == 0) *memory = 1;
    if (cuda::cluster_rank() == 1) other = memory;
    cuda::cluster_barrier();
    if (cuda::cluster_rank() == 1) return;
    for (int i = 0; i < 1000; ++i) {
      __syncthreads();
      if (threadIdx.x == 0) seen = std::isnan(*other);
    }
  });
  EXPECT_EQ(seen, 1);
}
#endif

TEST(Emulator, CopiesToSharedMemoryComeWhenTheyAreWaitedFor) {
  alignas(16) float from[128];
  std::iota(from, from + 128, 0.0f);
  emulator::launch({1, 1, 1}, 32, 1, sizeof(from), [&] {
    TST_SHARED_MEMORY(raw);
    cuda::Words4* const mine = reinterpret_cast<cuda::Words4*>(raw) + threadIdx.x;
    cuda::copy_to_shared(mine, reinterpret_cast<const cuda::Words4*>(from) + threadIdx.x);
    EXPECT_TRUE(std::isnan(cuda::as_float(mine->x)));
    cuda::copies_wait();
    EXPECT_EQ(cuda::as_float(mine->x), 4.0f * threadIdx.x);
  });
}

TEST(Emulator, ClustersMailAndWarpsShuffle) {
  struct Memory {
    uint32_t slots[2][4][4];
    cuda::Mailbox boxes[2];
  };
  std::vector<int> sums(4);
  emulator::launch({4, 1, 1}, 64, 4, sizeof(Memory), [&] {
    TST_SHARED_MEMORY(raw);
    Memory& memory = *reinterpret_cast<Memory*>(raw);
    int sum = static_cast<int>(threadIdx.x) + 1;
    for (int mask = 16; mask > 0; mask /= 2) sum += cuda::shuffle_xor(sum, mask);  // 33 + ... + 64 from thread 32 on
    if (threadIdx.x == 0) cuda::mailbox_open(&memory.boxes[0]), cuda::mailbox_open(&memory.boxes[1]);
    cuda::cluster_barrier();
    const unsigned rank = cuda::cluster_rank();
    for (int k = 0; k < 9 && threadIdx.x >= 32; ++k) {
      cuda::Mailbox* const box = &memory.boxes[k % 2];
      const uint32_t words[4] = {static_cast<uint32_t>(sum + k), 1, 2, 3};
      if (threadIdx.x == 40) cuda::mailbox_expect(box, 4 * sizeof(words));
      if (threadIdx.x < 36) cuda::mail(words, memory.slots[k % 2][rank], box, threadIdx.x - 32);
      cuda::mailbox_wait(box, k / 2);
      for (const auto& other : memory.slots[k % 2]) EXPECT_EQ(static_cast<int>(other[0]), 1552 + k);
      if (threadIdx.x == 32) sums[blockIdx.x] += static_cast<int>(memory.slots[k % 2][(rank + 1) % 4][0]) - k;
      cuda::warp_barrier();  // before a lane mails the next turn but one
    }
  });
  EXPECT_EQ(sums, std::vector<int>(4, 9 * 1552));
}

}  // namespace
}  // namespace tst::cpu
