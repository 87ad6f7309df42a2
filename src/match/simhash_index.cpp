// Exact search among SimHash codes: a scan while there are few, multi-index hashing beyond.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"
#include "match/bucket_table.h"
#include "match/fingerprint_index_impl.h"
#include "match/id_chunks.h"

namespace llmcache {
namespace {

constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();  ///< above every id

/// All numbers of `width` bits, those with fewer bits set first.
struct Masks {
  explicit Masks(int width) : values(std::size_t{1} << width) {
    for (const std::uint32_t value : values_of(width)) ++first[static_cast<std::size_t>(std::popcount(value)) + 1];
    for (std::size_t weight = 1; weight < first.size(); ++weight) first[weight] += first[weight - 1];
    std::array<std::uint32_t, kWeights> next = first;
    for (const std::uint32_t value : values_of(width)) {
      values[next[static_cast<std::size_t>(std::popcount(value))]++] = value;
    }
  }
  /// The numbers with `weight` bits set.
  [[nodiscard]] std::span<const std::uint32_t> operator[](std::size_t weight) const {
    if (weight + 1 >= kWeights) return {};
    return {values.data() + first[weight], values.data() + first[weight + 1]};
  }

  static constexpr std::size_t kWeights = 34;
  std::vector<std::uint32_t> values;
  std::array<std::uint32_t, kWeights> first{};

 private:
  static std::vector<std::uint32_t> values_of(int width) {
    std::vector<std::uint32_t> all(std::size_t{1} << width);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint32_t>(i);
    return all;
  }
};

/// For codes of kWords words of 64 bits.
template <std::size_t kWords>
class SimHashIndex final : public FingerprintIndexImpl {
 public:
  explicit SimHashIndex(std::pmr::memory_resource* memory) : codes_(memory), positions_(memory), buckets_(memory) {
    codes_.set_elements(kBlock);
  }

  void insert(std::uint32_t id, const Fingerprint& fingerprint) override {
    const Code code = checked(fingerprint);
    check_new_id(id, in_use(id));
    codes_.reserve(id);
    try {
      if (buckets_.created()) reserve_pieces(id, code);
    } catch (...) {
      codes_.cancel(id);
      throw;
    }
    codes_.take(id);
    std::uint64_t* block = codes_[id];
    const std::uint32_t row = id % kRows;
    for (std::size_t word = 0; word < kWords; ++word) block[word * kRows + row] = code[word];
    flip_bit(block + kWords * kRows, row);
    if (buckets_.created()) append_pieces(id, code);
    ++size_;
    if (size_ >= next_build_) build();
  }

  void erase(std::uint32_t id) noexcept override {
    if (!in_use(id)) return;
    if (buckets_.created()) {
      const Code code = code_of(id);
      std::uint32_t* own = positions_of(id);
      for (std::size_t i = 0; i < layout_->count; ++i) {
        const std::uint32_t moved = buckets_.remove(bucket_of(layout_->pieces[i], code), own[i]);
        if (moved != kNone) positions_of(moved)[i] = own[i];
      }
      positions_.drop(id);
    }
    flip_bit(codes_[id] + kWords * kRows, id % kRows);
    codes_.drop(id);
    --size_;
    if (buckets_.created() && size_ < kBuildAt / 4) drop_buckets();
  }

  [[nodiscard]] std::optional<Match> best(const Fingerprint& query, double tau) const override {
    const Code code = checked(query);
    const int radius = simhash_radius(tau, kBits);
    if (radius < 0 || size_ == 0) return std::nullopt;
    static const auto chosen = detail::cpu_has_popcnt() ? &SimHashIndex::search_popcnt : &SimHashIndex::search_base;
    const Found found = (this->*chosen)(code, static_cast<std::uint32_t>(radius));
    if (found.id == kNone) return std::nullopt;
    return Match{found.id, simhash_similarity(static_cast<int>(found.distance), kBits)};
  }

  [[nodiscard]] std::size_t size() const noexcept override { return size_; }

  void clear() noexcept override {
    drop_buckets();
    codes_.clear();
    size_ = 0;
  }

 private:
  static constexpr int kBits = 64 * static_cast<int>(kWords);
  static constexpr std::uint32_t kRows = 256;
  /// A block of codes: word 0 of all rows, word 1 of all rows, ...; then one bit for each row in use.
  static constexpr std::size_t kBlock = kWords * kRows + kRows / 64;
  /// A bucket keeps this part of a code: the half that its piece is not from, or the only word.
  static constexpr std::size_t kFilter = kWords == 4 ? 2 : 1;
  /// With so many entries the scan gives way to buckets, with so many more to more and smaller ones; measured.
  static constexpr std::size_t kBuildAt = 16384;
  static constexpr std::size_t kRebuildAt = 400000;
  /// What steps cost, in units of one code of a scan; measured.
  static constexpr double kLookupCost = 8;
  static constexpr double kItemCost = 1;

  using Code = std::array<std::uint64_t, kWords>;
  using Table = BucketTable<kFilter>;
  static constexpr std::uint32_t kGroup = Table::kGroup;

  struct Piece {
    std::size_t word;
    std::size_t filter;  ///< first word of the half that its buckets keep
    int shift;
    std::uint64_t mask;
    std::size_t first_bucket;
    const Masks* masks;
  };
  struct Found {
    std::uint32_t distance;
    std::uint32_t id;
  };
  struct Cost {
    double lookups;  ///< of all steps up to this radius
    double share;    ///< of the entries that these look-ups meet, if all codes are equally likely
  };

  /// How codes are cut into pieces.
  struct Layout {
    explicit Layout(std::size_t parts)
        : narrow(static_cast<int>(64 / parts)), wide(static_cast<int>(64 / parts) + 1), count(kWords * parts) {
      for (std::size_t word = 0, i = 0; word < kWords; ++word) {
        int shift = 0;
        for (std::size_t part = 0; part < parts; ++part, ++i) {
          const bool is_wide = part < 64 % parts;
          const int width = static_cast<int>(64 / parts) + (is_wide ? 1 : 0);
          const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
          const std::size_t filter = kWords == 4 ? (word < 2 ? 2 : 0) : (kWords == 2 ? 1 - word : 0);
          pieces[i] = {word, filter, shift, mask, buckets, is_wide ? &wide : &narrow};
          shift += width;
          buckets += mask + 1;
        }
      }
      Cost sum{0, 0};
      for (std::size_t radius = 0; radius < cost.size(); ++radius) {
        const Piece& piece = pieces[radius % count];
        const auto lookups = static_cast<double>((*piece.masks)[radius / count].size());
        sum.lookups += lookups;
        sum.share += lookups / static_cast<double>(piece.mask + 1);
        cost[radius] = sum;
      }
    }
    Layout(const Layout&) = delete;
    Layout& operator=(const Layout&) = delete;

    static constexpr std::size_t kMaxParts = 5;
    Masks narrow;
    Masks wide;
    std::size_t count;  ///< of pieces
    std::size_t buckets = 0;
    std::array<Piece, kWords * kMaxParts> pieces;
    std::array<Cost, 64 * kWords + 1> cost;  ///< of all steps up to a radius
  };

  /// Five pieces a word: 8,192 buckets for most; four: 65,536.
  static const Layout& layout_for(std::size_t entries) {
    static const Layout coarse(Layout::kMaxParts);
    if (entries < kRebuildAt) return coarse;
    static const Layout fine(4);
    return fine;
  }
  static std::size_t bucket_of(const Piece& piece, const Code& code) {
    return piece.first_bucket + ((code[piece.word] >> piece.shift) & piece.mask);
  }

  static Code checked(const Fingerprint& fingerprint) {
    if (fingerprint.bits.size() != kWords) {
      throw Error(ErrorCode::kInvalidInput,
                  fmt::format("a fingerprint of {} SimHash bits was given; this index holds {}",
                              64 * fingerprint.bits.size(), kBits));
    }
    Code code{};
    std::copy(fingerprint.bits.begin(), fingerprint.bits.end(), code.begin());
    return code;
  }
  [[nodiscard]] bool in_use(std::uint32_t id) const noexcept {
    const std::uint64_t* block = codes_.find(id);
    return block && bit_at(block + kWords * kRows, id % kRows);
  }
  [[nodiscard]] Code code_of(std::uint32_t id) const noexcept {
    Code code{};
    for (std::size_t word = 0; word < kWords; ++word) code[word] = codes_[id][word * kRows + id % kRows];
    return code;
  }

  [[nodiscard]] std::uint32_t* positions_of(std::uint32_t id) const noexcept {
    return positions_[id] + (id % kRows) * layout_->count;
  }
  void reserve_pieces(std::uint32_t id, const Code& code) {
    positions_.reserve(id);
    try {
      for (std::size_t i = 0; i < layout_->count; ++i) buckets_.reserve(bucket_of(layout_->pieces[i], code));
    } catch (...) {
      positions_.cancel(id);
      throw;
    }
  }
  void append_pieces(std::uint32_t id, const Code& code) noexcept {
    positions_.take(id);
    std::uint32_t* own = positions_of(id);
    for (std::size_t i = 0; i < layout_->count; ++i) {
      const Piece& piece = layout_->pieces[i];
      own[i] = buckets_.append(bucket_of(piece, code), code.data() + piece.filter, id);
    }
  }
  void drop_buckets() noexcept {
    buckets_.clear();
    positions_.clear();
    layout_ = nullptr;
    next_build_ = kBuildAt;
  }
  /// Fills the buckets from the codes. Where memory is lacking the scan goes on, and a later insertion tries again.
  void build() noexcept {
    drop_buckets();
    try {
      layout_ = &layout_for(size_);
      positions_.set_elements(layout_->count * kRows);
      buckets_.create(layout_->buckets);
      for (std::size_t number = 0; number < codes_.count(); ++number) {
        for (std::uint32_t row = 0; codes_.chunk(number) && row < kRows; ++row) {
          const auto id = static_cast<std::uint32_t>(number * kRows + row);
          if (!in_use(id)) continue;
          const Code code = code_of(id);
          reserve_pieces(id, code);
          append_pieces(id, code);
        }
      }
      next_build_ = size_ < kRebuildAt ? kRebuildAt : std::numeric_limits<std::size_t>::max();
    } catch (...) {
      drop_buckets();
      next_build_ = size_ + size_ / 4;
    }
  }

  [[nodiscard]] LLMCACHE_ALWAYS_INLINE std::uint32_t distance_from(std::size_t first, std::size_t last,
                                                                   const std::uint64_t* block, std::uint32_t row,
                                                                   const Code& query) const {
    std::uint32_t distance = 0;
    for (std::size_t word = first; word < last; ++word) {
      distance += static_cast<std::uint32_t>(__builtin_popcountll(block[word * kRows + row] ^ query[word]));
    }
    return distance;
  }

  static LLMCACHE_ALWAYS_INLINE std::uint32_t filter_distance(const std::uint64_t* words, std::uint32_t item,
                                                              const std::uint64_t* wanted) {
    std::uint32_t distance = 0;
    for (std::size_t word = 0; word < kFilter; ++word) {
      distance += static_cast<std::uint32_t>(__builtin_popcountll(words[item * kFilter + word] ^ wanted[word]));
    }
    return distance;
  }

  LLMCACHE_ALWAYS_INLINE void scan_body(const Code& query, Found& best) const {
    constexpr std::size_t kFirst = (kWords + 1) / 2;  ///< words that rule most codes out
    for (std::size_t number = 0; number < codes_.count(); ++number) {
      const std::uint64_t* block = codes_.chunk(number);
      if (!block) continue;
      for (std::uint32_t row = 0; row < kRows; ++row) {
        std::uint32_t distance = distance_from(0, kFirst, block, row, query);
        if (distance > best.distance) continue;
        distance += distance_from(kFirst, kWords, block, row, query);
        const auto id = static_cast<std::uint32_t>(number * kRows + row);
        if (distance > best.distance || (distance == best.distance && id >= best.id)) continue;
        if (bit_at(block + kWords * kRows, row)) best = {distance, id};
      }
    }
  }

  /// Items whose kept half is near enough to look at the rest: collected, so that their memory can be fetched together.
  struct Candidates {
    static constexpr std::size_t kRoom = 64;
    struct Item {
      const std::uint32_t* id;
      std::uint32_t distance;  ///< of the kept half
    };
    std::array<Item, kRoom> items;
    std::size_t count = 0;
  };

  LLMCACHE_ALWAYS_INLINE void verify_body(Candidates& candidates, const Piece& piece, const Code& query,
                                          Found& best) const {
    const std::size_t first = kWords == 4 ? 2 - piece.filter : 1 - piece.filter;  // words that buckets do not keep
    const std::size_t last = kWords == 1 ? first : first + kFilter;
    for (std::size_t i = 0; i < candidates.count && first < last; ++i) {
      const std::uint32_t id = *candidates.items[i].id;
      __builtin_prefetch(codes_[id] + first * kRows + id % kRows);
    }
    for (std::size_t i = 0; i < candidates.count; ++i) {
      const std::uint32_t id = *candidates.items[i].id;
      const std::uint32_t distance =
          candidates.items[i].distance + distance_from(first, last, codes_[id], id % kRows, query);
      if (distance < best.distance || (distance == best.distance && id < best.id)) best = {distance, id};
    }
    candidates.count = 0;
  }

  /// All buckets whose key differs from the query's piece in `weight` bits. Returns the items in them.
  LLMCACHE_ALWAYS_INLINE std::size_t probe_body(const Piece& piece, std::uint32_t weight, const Code& query,
                                                Found& best) const {
    constexpr std::size_t kBatch = 32;
    constexpr std::size_t kFetched = 64;  ///< words of a bucket at most; the processor sees where a longer one goes on
    const typename Table::Bucket* buckets = buckets_.data() + piece.first_bucket;
    const std::uint64_t key = (query[piece.word] >> piece.shift) & piece.mask;
    const std::span<const std::uint32_t> masks = (*piece.masks)[weight];
    const std::uint64_t* wanted = query.data() + piece.filter;
    // The bits that differ in the piece are not in the part that buckets keep, unless there is only one word.
    const std::uint32_t elsewhere = kWords == 1 ? 0 : weight;
    std::size_t items = 0;
    Candidates candidates;
    for (std::size_t begin = 0; begin < masks.size(); begin += kBatch) {
      const std::size_t end = std::min(begin + kBatch, masks.size());
      std::array<const typename Table::Bucket*, kBatch> found;
      std::size_t count = 0;
      for (std::size_t i = begin; i < end; ++i) {
        const typename Table::Bucket& bucket = buckets[key ^ masks[i]];
        if (bucket.size == 0) continue;
        const std::uint64_t* last = bucket.words + std::min<std::size_t>(bucket.size * kFilter, kFetched) - 1;
        for (const std::uint64_t* line = bucket.words; line < last; line += 8) __builtin_prefetch(line);
        __builtin_prefetch(last);
        found[count++] = &bucket;
      }
      for (std::size_t i = end; i < std::min(end + kBatch, masks.size()); ++i) {
        __builtin_prefetch(buckets + (key ^ masks[i]));
      }
      for (std::size_t b = 0; b < count; ++b) {
        const typename Table::Bucket bucket = *found[b];
        items += bucket.size;
        for (std::uint32_t group = 0; group < bucket.size; group += kGroup) {
          std::array<std::uint32_t, kGroup> filtered;
          for (std::uint32_t i = 0; i < kGroup; ++i) filtered[i] = filter_distance(bucket.words, group + i, wanted);
          const std::uint32_t nearest =
              std::min(std::min(filtered[0], filtered[1]), std::min(filtered[2], filtered[3]));
          if (nearest + elsewhere > best.distance) continue;
          if (candidates.count + kGroup > Candidates::kRoom) verify_body(candidates, piece, query, best);
          for (std::uint32_t i = 0; i < std::min(kGroup, bucket.size - group); ++i) {
            if (filtered[i] + elsewhere > best.distance) continue;
            const std::uint32_t* id = bucket.ids() + group + i;
            __builtin_prefetch(id);
            candidates.items[candidates.count++] = {id, filtered[i]};
          }
        }
      }
      verify_body(candidates, piece, query, best);
    }
    return items;
  }

  LLMCACHE_ALWAYS_INLINE Found search_body(const Code& query, std::uint32_t radius) const {
    Found best{radius, kNone};
    if (!buckets_.created()) {
      scan_body(query, best);
      return best;
    }
    // Step r looks up piece r % m with r / m different bits. After it every code within r has been met: if none of
    // the pieces 0 ... r % m differed in at most r / m bits and none of the others in at most r / m - 1, the code
    // would differ in more than r bits.
    const Layout& layout = *layout_;
    const auto entries = static_cast<double>(size_);
    const auto price = [&](const Cost& from, const Cost& to) {
      return kLookupCost * (to.lookups - from.lookups) + kItemCost * entries * (to.share - from.share);
    };
    double spent = 0;
    Cost done{0, 0};
    for (std::uint32_t step = 0; step <= best.distance; ++step) {
      const double next = price(done, layout.cost[step]);
      const double rest = price(done, layout.cost[best.distance]);
      // A quarter of a scan is bet on meeting a near one; then whichever is cheaper goes on.
      if (spent > entries || (rest > entries - spent && spent + next > entries / 4)) {
        scan_body(query, best);
        return best;
      }
      const std::size_t items =
          probe_body(layout.pieces[step % layout.count], static_cast<std::uint32_t>(step / layout.count), query, best);
      spent += kLookupCost * (layout.cost[step].lookups - done.lookups) + kItemCost * static_cast<double>(items);
      done = layout.cost[step];
    }
    return best;
  }

  [[nodiscard]] Found search_base(const Code& query, std::uint32_t radius) const { return search_body(query, radius); }
  [[nodiscard]] LLMCACHE_TARGET("popcnt") Found search_popcnt(const Code& query, std::uint32_t radius) const {
    return search_body(query, radius);
  }

  IdChunks<std::uint64_t, kRows> codes_;
  IdChunks<std::uint32_t, kRows> positions_;  ///< [row, piece]: where in its bucket an entry is
  Table buckets_;                             ///< empty while the scan is used
  const Layout* layout_ = nullptr;            ///< of the buckets
  std::size_t size_ = 0;
  std::size_t next_build_ = kBuildAt;
};

}  // namespace

std::unique_ptr<FingerprintIndexImpl> make_simhash_index(int bits, std::pmr::memory_resource* memory) {
  if (bits == 64) return std::make_unique<SimHashIndex<1>>(memory);
  if (bits == 128) return std::make_unique<SimHashIndex<2>>(memory);
  return std::make_unique<SimHashIndex<4>>(memory);
}

}  // namespace llmcache
