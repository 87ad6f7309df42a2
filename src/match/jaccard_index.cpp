// Search among sets of shingles by Jaccard similarity: a scan while there are few, MinHash bands beyond.
#include <fmt/core.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <utility>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"
#include "llmcache/fingerprint/jaccard.h"
#include "match/bucket_table.h"
#include "match/fingerprint_index_impl.h"
#include "match/id_chunks.h"

namespace llmcache {
namespace {

constexpr std::size_t kBands = 32;
constexpr std::size_t kBandRows = 4;
constexpr std::size_t kHashes = kBands * kBandRows;

/// h(x) = factor * x + offset modulo 2^32 of the low half of a shingle's hash, which is random already.
struct Hashes {
  Hashes() {
    std::mt19937_64 engine(0x6d696e68617368);  // any fixed number
    for (std::size_t i = 0; i < kHashes; ++i) {
      factors[i] = static_cast<std::uint32_t>(engine()) | 1;
      offsets[i] = static_cast<std::uint32_t>(engine());
    }
  }
  std::array<std::uint32_t, kHashes> factors;
  std::array<std::uint32_t, kHashes> offsets;
};

LLMCACHE_ALWAYS_INLINE void signature_body(std::span<const std::uint64_t> shingles, const Hashes& hashes,
                                           std::uint32_t* minima) {
  for (std::size_t i = 0; i < kHashes; ++i) minima[i] = std::numeric_limits<std::uint32_t>::max();
  const std::uint32_t* factors = hashes.factors.data();
  const std::uint32_t* offsets = hashes.offsets.data();
  for (const std::uint64_t shingle : shingles) {
    const auto x = static_cast<std::uint32_t>(shingle);
    for (std::size_t i = 0; i < kHashes; ++i) {
      const std::uint32_t hash = factors[i] * x + offsets[i];
      minima[i] = hash < minima[i] ? hash : minima[i];
    }
  }
}
void signature_base(std::span<const std::uint64_t> shingles, const Hashes& hashes, std::uint32_t* minima) {
  signature_body(shingles, hashes, minima);
}
LLMCACHE_TARGET("avx2")
void signature_avx2(std::span<const std::uint64_t> shingles, const Hashes& hashes, std::uint32_t* minima) {
  signature_body(shingles, hashes, minima);
}

using Bands = std::array<std::uint64_t, kBands>;

/// One hash for the minima of each band.
Bands bands_of(std::span<const std::uint64_t> shingles) {
  static const Hashes hashes;
  static const auto chosen = detail::cpu_has_avx2() ? &signature_avx2 : &signature_base;
  std::array<std::uint32_t, kHashes> minima;
  chosen(shingles, hashes, minima.data());
  Bands bands;
  for (std::size_t band = 0; band < kBands; ++band) {
    bands[band] = XXH3_64bits(minima.data() + band * kBandRows, kBandRows * sizeof(std::uint32_t));
  }
  return bands;
}

class JaccardIndex final : public FingerprintIndexImpl {
 public:
  explicit JaccardIndex(std::pmr::memory_resource* memory)
      : memory_(memory), sets_(memory), positions_(memory), buckets_(memory) {
    sets_.set_elements(kRows);
    positions_.set_elements(kRows * kBands);
  }
  ~JaccardIndex() override { clear(); }
  JaccardIndex(const JaccardIndex&) = delete;
  JaccardIndex& operator=(const JaccardIndex&) = delete;

  void insert(std::uint32_t id, const Fingerprint& fingerprint) override {
    check_shingles(fingerprint);
    check_new_id(id, in_use(id));
    const std::size_t bytes = fingerprint.shingles.size() * sizeof(std::uint64_t);
    sets_.reserve(id);
    std::uint64_t* copy = nullptr;
    const Bands bands = buckets_.created() ? bands_of(fingerprint.shingles) : Bands{};
    try {
      copy = static_cast<std::uint64_t*>(memory_->allocate(bytes, alignof(std::uint64_t)));
      if (buckets_.created()) reserve_bands(id, bands);
    } catch (...) {
      if (copy) memory_->deallocate(copy, bytes, alignof(std::uint64_t));
      sets_.cancel(id);
      throw;
    }
    std::memcpy(copy, fingerprint.shingles.data(), bytes);
    sets_.take(id);
    set(id) = {copy, fingerprint.shingles.size()};
    if (buckets_.created()) append_bands(id, bands);
    ++size_;
    if (!buckets_.created() && size_ >= next_build_) build();
  }

  void erase(std::uint32_t id) noexcept override {
    if (!in_use(id)) return;
    if (buckets_.created()) {
      const Bands bands = bands_of(shingles(id));
      for (std::size_t band = 0; band < kBands; ++band) {
        const std::uint32_t position = positions_of(id)[band];
        const std::uint32_t moved = buckets_.remove(bucket_of(band, bands), position);
        if (moved != Table::kNone) positions_of(moved)[band] = position;
      }
      positions_.drop(id);
    }
    free(set(id));
    sets_.drop(id);
    --size_;
    if (buckets_.created() && size_ < kBuildAt / 4) drop_buckets();
  }

  [[nodiscard]] std::optional<Match> best(const Fingerprint& query, double tau) const override {
    check_shingles(query);
    if (size_ == 0 || std::isnan(tau)) return std::nullopt;
    Match found{kNone, tau};
    if (!buckets_.created() || tau < kLeastTau) {
      for (std::size_t number = 0; number < sets_.count(); ++number) {
        for (std::uint32_t row = 0; sets_.chunk(number) && row < kRows; ++row) {
          if (sets_.chunk(number)[row].data) {
            consider(found, static_cast<std::uint32_t>(number * kRows + row), query.shingles);
          }
        }
      }
    } else {
      const Bands bands = bands_of(query.shingles);
      for (std::size_t band = 0; band < kBands; ++band) {
        __builtin_prefetch(buckets_.data() + bucket_of(band, bands));
      }
      std::array<std::uint32_t, 256> recent;  // near entries are met in many bands
      recent.fill(kNone);
      for (std::size_t band = 0; band < kBands; ++band) {
        const Table::Bucket& bucket = buckets_.data()[bucket_of(band, bands)];
        for (std::uint32_t i = 0; i < bucket.size; ++i) {
          if (bucket.words[i] != bands[band]) continue;
          const std::uint32_t id = bucket.ids()[i];
          if (std::exchange(recent[id % recent.size()], id) != id) consider(found, id, query.shingles);
        }
      }
    }
    if (found.id == kNone) return std::nullopt;
    return found;
  }

  [[nodiscard]] std::size_t size() const noexcept override { return size_; }

  void clear() noexcept override {
    drop_buckets();
    for (std::size_t number = 0; number < sets_.count(); ++number) {
      for (std::uint32_t row = 0; sets_.chunk(number) && row < kRows; ++row) free(sets_.chunk(number)[row]);
    }
    sets_.clear();
    size_ = 0;
  }

 private:
  using Table = BucketTable<1>;
  static constexpr std::uint32_t kNone = Table::kNone;
  static constexpr std::uint32_t kRows = 64;
  static constexpr std::size_t kBuckets = 8192;  ///< of a band
  /// With so many entries the bands are filled.
  static constexpr std::size_t kBuildAt = 1024;
  /// Below this similarity the bands would overlook too many.
  static constexpr double kLeastTau = 0.5;

  struct Set {
    std::uint64_t* data = nullptr;
    std::size_t size = 0;
  };

  static void check_shingles(const Fingerprint& fingerprint) {
    if (fingerprint.shingles.empty()) {
      throw Error(ErrorCode::kInvalidInput,
                  "a fingerprint without shingles was given; this index holds the kind 'jaccard'");
    }
  }
  [[nodiscard]] bool in_use(std::uint32_t id) const noexcept {
    const Set* block = sets_.find(id);
    return block && block[id % kRows].data;
  }
  [[nodiscard]] Set& set(std::uint32_t id) const noexcept { return sets_[id][id % kRows]; }
  [[nodiscard]] std::span<const std::uint64_t> shingles(std::uint32_t id) const noexcept {
    return {set(id).data, set(id).size};
  }
  void free(Set& set) noexcept {
    if (set.data) memory_->deallocate(set.data, set.size * sizeof(std::uint64_t), alignof(std::uint64_t));
    set = {};
  }
  [[nodiscard]] std::uint32_t* positions_of(std::uint32_t id) const noexcept {
    return positions_[id] + (id % kRows) * kBands;
  }
  static std::size_t bucket_of(std::size_t band, const Bands& bands) noexcept {
    return band * kBuckets + bands[band] % kBuckets;
  }

  void consider(Match& found, std::uint32_t id, std::span<const std::uint64_t> wanted) const noexcept {
    const auto shorter = static_cast<double>(std::min(set(id).size, wanted.size()));
    const auto longer = static_cast<double>(std::max(set(id).size, wanted.size()));
    if (shorter / longer < found.similarity) return;  // the similarity is at most this
    const double value = jaccard(shingles(id), wanted);
    if (value > found.similarity || (value == found.similarity && id < found.id)) found = {id, value};
  }

  void reserve_bands(std::uint32_t id, const Bands& bands) {
    positions_.reserve(id);
    try {
      for (std::size_t band = 0; band < kBands; ++band) buckets_.reserve(bucket_of(band, bands));
    } catch (...) {
      positions_.cancel(id);
      throw;
    }
  }
  void append_bands(std::uint32_t id, const Bands& bands) noexcept {
    positions_.take(id);
    for (std::size_t band = 0; band < kBands; ++band) {
      positions_of(id)[band] = buckets_.append(bucket_of(band, bands), bands.data() + band, id);
    }
  }
  void drop_buckets() noexcept {
    buckets_.clear();
    positions_.clear();
    next_build_ = kBuildAt;
  }
  /// Fills the bands. Where memory is lacking the scan goes on, and a later insertion tries again.
  void build() noexcept {
    try {
      buckets_.create(kBands * kBuckets);
      for (std::size_t number = 0; number < sets_.count(); ++number) {
        for (std::uint32_t row = 0; sets_.chunk(number) && row < kRows; ++row) {
          const auto id = static_cast<std::uint32_t>(number * kRows + row);
          if (!in_use(id)) continue;
          const Bands bands = bands_of(shingles(id));
          reserve_bands(id, bands);
          append_bands(id, bands);
        }
      }
    } catch (...) {
      drop_buckets();
      next_build_ = size_ + size_ / 4;
    }
  }

  std::pmr::memory_resource* memory_;
  IdChunks<Set, kRows> sets_;
  IdChunks<std::uint32_t, kRows> positions_;  ///< [row, band]: where in its bucket an entry is
  Table buckets_;                             ///< of each band; empty while the scan is used
  std::size_t size_ = 0;
  std::size_t next_build_ = kBuildAt;
};

}  // namespace

std::unique_ptr<FingerprintIndexImpl> make_jaccard_index(std::pmr::memory_resource* memory) {
  return std::make_unique<JaccardIndex>(memory);
}

}  // namespace llmcache
