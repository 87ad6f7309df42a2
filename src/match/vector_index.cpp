// Search among unit vectors by cosine: a scan while there are few, inverted lists beyond.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"
#include "match/fingerprint_index_impl.h"
#include "match/id_chunks.h"

namespace llmcache {
namespace {

class VectorIndex final : public FingerprintIndexImpl {
 public:
  explicit VectorIndex(std::pmr::memory_resource* memory)
      : rows_(memory), used_(memory), places_(memory), lists_(memory), centroids_(memory) {
    used_.set_elements(kRows / 64);
    places_.set_elements(std::size_t{kRows} * 2);
  }

  void insert(std::uint32_t id, const Fingerprint& fingerprint) override {
    check_dims(fingerprint);
    check_length(fingerprint);
    check_new_id(id, in_use(id));
    if (size_ == 0) clear();  // takes on the dimensions of the new entry
    const std::size_t old_dims = std::exchange(dims_, fingerprint.vector.size());
    rows_.set_elements(kRows * dims_);
    std::size_t list = 0;
    try {
      rows_.reserve(id);
      used_.reserve(id);
      places_.reserve(id);
      if (lists_.empty()) {
        centroids_.assign(fingerprint.vector.begin(), fingerprint.vector.end());
        lists_.emplace_back();
      }
      list = nearest_list(fingerprint.vector.data());
      auto& ids = lists_[list].ids;
      if (ids.size() == ids.capacity()) ids.reserve(ids.size() + ids.size() / 2 + 4);
    } catch (...) {
      rows_.cancel(id);
      used_.cancel(id);
      places_.cancel(id);
      if (size_ == 0) clear();
      dims_ = old_dims;
      throw;
    }
    rows_.take(id);
    used_.take(id);
    places_.take(id);
    std::copy(fingerprint.vector.begin(), fingerprint.vector.end(), row(id));
    flip_bit(used_[id], id % kRows);
    append(list, id);
    ++size_;
    if (lists_[list].ids.size() > std::max<std::size_t>(lists_[list].limit, longest_list())) split(list);
  }

  void erase(std::uint32_t id) noexcept override {
    if (!in_use(id)) return;
    const std::uint32_t list = place(id).list;
    const std::uint32_t position = place(id).position;
    auto& ids = lists_[list].ids;
    ids[position] = ids.back();
    place(ids[position]).position = position;
    ids.pop_back();
    flip_bit(used_[id], id % kRows);
    rows_.drop(id);
    used_.drop(id);
    places_.drop(id);
    --size_;
    if (size_ == 0) return clear();
    if (ids.empty()) {
      remove_list(list);
    } else if (ids.size() < ids.capacity() / 4) {
      try {
        ids.shrink_to_fit();
      } catch (...) {  // it stays larger than it needs to be
        return;
      }
    }
  }

  [[nodiscard]] std::optional<Match> best(const Fingerprint& query, double tau) const override {
    check_dims(query);
    if (size_ == 0 || std::isnan(tau)) return std::nullopt;
    Match found{std::numeric_limits<std::uint32_t>::max(), tau};
    const float* wanted = query.vector.data();
    if (size_ <= kScanned) {
      for (std::size_t number = 0; number < rows_.count(); ++number) {
        const float* block = rows_.chunk(number);
        for (std::uint32_t i = 0; block && i < kRows; ++i) {
          if (bit_at(used_.chunk(number), i)) {
            consider(found, static_cast<std::uint32_t>(number * kRows + i), block + i * dims_, wanted);
          }
        }
      }
    } else {
      for (const std::size_t list : nearest_lists(wanted)) {
        const auto& ids = lists_[list].ids;
        for (std::size_t i = 0; i < ids.size(); ++i) {
          if (i + 1 < ids.size()) fetch(row(ids[i + 1]));
          consider(found, ids[i], row(ids[i]), wanted);
        }
      }
    }
    if (found.id == std::numeric_limits<std::uint32_t>::max()) return std::nullopt;
    return found;
  }

  [[nodiscard]] std::size_t size() const noexcept override { return size_; }

  void clear() noexcept override {
    rows_.clear();
    used_.clear();
    places_.clear();
    std::pmr::vector<List>(lists_.get_allocator()).swap(lists_);
    std::pmr::vector<float>(centroids_.get_allocator()).swap(centroids_);
    size_ = 0;
  }

 private:
  static constexpr std::uint32_t kRows = 64;
  /// Up to so many entries all are compared.
  static constexpr std::size_t kScanned = 32768;
  static constexpr std::size_t kShortest = 128;
  /// Lists that a query reads: at least kProbes, and this share of them; measured (see the header of the index).
  static constexpr std::size_t kProbes = 16;
  static constexpr std::size_t kProbedShare = 24;
  static constexpr int kRounds = 6;
  static constexpr double kUnit = 1e-3;

  struct List {
    using allocator_type = std::pmr::polymorphic_allocator<std::uint32_t>;
    explicit List(const allocator_type& allocator = {}) : ids(allocator) {}
    List(List&& other) noexcept = default;
    List(List&& other, const allocator_type& allocator) : ids(std::move(other.ids), allocator), limit(other.limit) {}
    List& operator=(List&&) = default;
    List(const List&) = delete;
    List& operator=(const List&) = delete;
    ~List() = default;

    std::pmr::vector<std::uint32_t> ids;
    std::size_t limit = 0;  ///< no splitting up to here
  };
  struct Place {
    std::uint32_t& list;
    std::uint32_t& position;
  };

  void check_dims(const Fingerprint& fingerprint) const {
    const std::size_t count = fingerprint.vector.size();
    if (count == 0 || (size_ > 0 && count != dims_)) {
      throw Error(ErrorCode::kInvalidInput,
                  fmt::format("a fingerprint vector of {} values was given; this index holds vectors of {}", count,
                              size_ > 0 ? fmt::format("{} values", dims_) : "at least one value"));
    }
  }
  static void check_length(const Fingerprint& fingerprint) {
    const double square = detail::dot(fingerprint.vector.data(), fingerprint.vector.data(), fingerprint.vector.size());
    if (!(std::abs(square - 1) <= kUnit)) {
      throw Error(
          ErrorCode::kInvalidInput,
          fmt::format("a fingerprint vector with the squared length {} was given; unit length is expected: make "
                      "it with a Fingerprinter",
                      square));
    }
  }
  [[nodiscard]] bool in_use(std::uint32_t id) const noexcept {
    const std::uint64_t* block = used_.find(id);
    return block && bit_at(block, id % kRows);
  }
  [[nodiscard]] float* row(std::uint32_t id) const noexcept { return rows_[id] + (id % kRows) * dims_; }
  [[nodiscard]] Place place(std::uint32_t id) const noexcept {
    std::uint32_t* pair = places_[id] + std::size_t{id % kRows} * 2;
    return {pair[0], pair[1]};
  }
  void fetch(const float* values) const noexcept {
    for (std::size_t i = 0; i < std::min<std::size_t>(dims_, 128); i += 16) __builtin_prefetch(values + i);
  }
  void consider(Match& found, std::uint32_t id, const float* values, const float* wanted) const noexcept {
    const double cosine = detail::unit_cosine(values, wanted, dims_);
    if (cosine > found.similarity || (cosine == found.similarity && id < found.id)) found = {id, cosine};
  }

  [[nodiscard]] std::size_t nearest_list(const float* values) const noexcept {
    std::size_t nearest = 0;
    double most = -std::numeric_limits<double>::infinity();
    for (std::size_t list = 0; list < lists_.size(); ++list) {
      const double cosine = detail::dot(centroids_.data() + list * dims_, values, dims_);
      if (cosine > most) {
        most = cosine;
        nearest = list;
      }
    }
    return nearest;
  }
  [[nodiscard]] std::vector<std::size_t> nearest_lists(const float* values) const {
    std::vector<std::pair<double, std::size_t>> order(lists_.size());
    for (std::size_t list = 0; list < order.size(); ++list) {
      const double cosine = detail::dot(centroids_.data() + list * dims_, values, dims_);
      // A query that is not a number is near to nothing; the order must be one all the same.
      order[list] = {std::isnan(cosine) ? 2.0 : -cosine, list};
    }
    const std::size_t count = std::min(order.size(), std::max(kProbes, order.size() / kProbedShare));
    const auto last = order.begin() + static_cast<std::ptrdiff_t>(count);
    std::partial_sort(order.begin(), last, order.end());
    std::vector<std::size_t> nearest(count);
    std::transform(order.begin(), last, nearest.begin(), [](const auto& item) { return item.second; });
    return nearest;
  }

  void append(std::size_t list, std::uint32_t id) noexcept {
    auto& ids = lists_[list].ids;
    place(id).list = static_cast<std::uint32_t>(list);
    place(id).position = static_cast<std::uint32_t>(ids.size());
    ids.push_back(id);  // there is room
  }
  void remove_list(std::size_t list) noexcept {
    const std::size_t last = lists_.size() - 1;
    if (list != last) {
      lists_[list] = std::move(lists_[last]);
      std::copy_n(centroids_.data() + last * dims_, dims_, centroids_.data() + list * dims_);
      for (const std::uint32_t id : lists_[list].ids) place(id).list = static_cast<std::uint32_t>(list);
    }
    lists_.pop_back();
    centroids_.resize(last * dims_);
  }
  [[nodiscard]] std::size_t longest_list() const noexcept {
    return std::max(kShortest, static_cast<std::size_t>(std::sqrt(static_cast<double>(size_))));
  }

  /// Splits a list in two by spherical 2-means. Where memory is lacking or the vectors do not fall into two groups,
  /// the list stays and may grow to twice its length.
  void split(std::size_t list) noexcept {
    try {
      const std::vector<std::uint32_t> ids(lists_[list].ids.begin(), lists_[list].ids.end());
      std::vector<float> means(2 * dims_);
      const std::vector<bool> second = two_means(ids, means);
      const auto count = static_cast<std::size_t>(std::count(second.begin(), second.end(), true));
      if (std::min(count, ids.size() - count) >= ids.size() / 16) {
        if (centroids_.capacity() < centroids_.size() + dims_) centroids_.reserve(2 * centroids_.size());
        List other(lists_.get_allocator().resource());
        other.ids.reserve(count);
        lists_.push_back(std::move(other));
        centroids_.insert(centroids_.end(), means.begin() + static_cast<std::ptrdiff_t>(dims_), means.end());
        std::copy_n(means.begin(), dims_, centroids_.begin() + static_cast<std::ptrdiff_t>(list * dims_));
        lists_[list].ids.clear();
        for (std::size_t i = 0; i < ids.size(); ++i) append(second[i] ? lists_.size() - 1 : list, ids[i]);
        lists_[list].limit = 0;
        return;
      }
    } catch (...) {  // nothing has changed; the list is read as a whole
      lists_[list].limit = 2 * lists_[list].ids.size();
      return;
    }
    lists_[list].limit = 2 * lists_[list].ids.size();
  }
  [[nodiscard]] std::uint32_t farthest(const std::vector<std::uint32_t>& ids, const float* from) const noexcept {
    return *std::min_element(ids.begin(), ids.end(), [&](std::uint32_t a, std::uint32_t b) {
      return detail::dot(row(a), from, dims_) < detail::dot(row(b), from, dims_);
    });
  }
  /// Which vectors belong to the second of two means, and the means: [2, dims], unit length.
  std::vector<bool> two_means(const std::vector<std::uint32_t>& ids, std::vector<float>& means) const {
    const std::uint32_t first = farthest(ids, row(ids.front()));
    const std::uint32_t second = farthest(ids, row(first));
    std::copy_n(row(first), dims_, means.begin());
    std::copy_n(row(second), dims_, means.begin() + static_cast<std::ptrdiff_t>(dims_));
    std::vector<bool> in_second(ids.size());
    std::vector<double> sums(2 * dims_);
    for (int round = 0; round < kRounds; ++round) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const float* values = row(ids[i]);
        in_second[i] = detail::dot(values, means.data() + dims_, dims_) > detail::dot(values, means.data(), dims_);
        double* sum = sums.data() + (in_second[i] ? dims_ : 0);
        for (std::size_t d = 0; d < dims_; ++d) sum[d] += static_cast<double>(values[d]);
      }
      for (std::size_t half = 0; half < 2; ++half) {
        double square = 0;
        for (std::size_t d = 0; d < dims_; ++d) square += sums[half * dims_ + d] * sums[half * dims_ + d];
        if (square == 0) continue;  // an empty half keeps its mean
        for (std::size_t d = 0; d < dims_; ++d) {
          means[half * dims_ + d] = static_cast<float>(sums[half * dims_ + d] / std::sqrt(square));
        }
      }
    }
    return in_second;
  }

  std::size_t dims_ = 0;
  std::size_t size_ = 0;
  IdChunks<float, kRows> rows_;            ///< [row, dims]
  IdChunks<std::uint64_t, kRows> used_;    ///< one bit for each row
  IdChunks<std::uint32_t, kRows> places_;  ///< [row, 2]: list, position in it
  std::pmr::vector<List> lists_;
  std::pmr::vector<float> centroids_;  ///< [lists, dims]
};

}  // namespace

std::unique_ptr<FingerprintIndexImpl> make_vector_index(std::pmr::memory_resource* memory) {
  return std::make_unique<VectorIndex>(memory);
}

}  // namespace llmcache
