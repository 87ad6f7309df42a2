// Principal components of a sample of states, as a fingerprint with fewer dimensions.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

namespace llmcache {

/// The mean of a sample and the directions in which the sample varies most.
///
/// K. Pearson 1901; computed from the eigenvectors of the covariance matrix, or of the Gram matrix
/// where the sample has fewer rows than dimensions. The sign of a component is chosen so that its
/// value of largest size is positive, so equal samples give equal models.
/// Thread safety: immutable after construction; all functions may be called at once.
class PcaModel {
 public:
  /// Fits `components` components to `rows`, a matrix [rows, dims] stored row by row. Takes
  /// O(min(rows, dims)^2 * max(rows, dims)) time and a few times the sample's memory: seconds for 768 dimensions.
  /// Throws Error(kInvalidInput) if dims < 1, if the size of `rows` is no multiple of it, if there are
  /// fewer than two rows, if a value is not finite, or if the sample does not vary in as many
  /// directions as are asked for; Error(kInvalidOptions) unless 1 <= components <= min(dims, rows - 1).
  static PcaModel fit(std::span<const float> rows, std::int64_t dims, std::int64_t components);

  /// Writes the model to a file: first to a temporary one beside it, which is flushed and then renamed, so
  /// a reader never sees half a file. `model_digest`: any text that names the transformer whose
  /// states were the sample, for example the SHA-256 of its weights; at most 4096 bytes.
  /// Throws Error(kInvalidFile) if the file cannot be written, Error(kInvalidInput) if the digest is too long.
  void save(const std::filesystem::path& path, std::string_view model_digest) const;

  /// Reads a file that `save` wrote. Throws Error(kInvalidFile) if it cannot be read, is no such
  /// file, is cut short, damaged (XXH3 checksum), of another version, belongs to another model
  /// (`model_digest` differs), or has other than `expected_dims` dimensions (0: any).
  static PcaModel load(const std::filesystem::path& path, std::string_view model_digest,
                       std::int64_t expected_dims = 0);

  /// The coordinates of state - mean along the components: [components]. Not scaled to unit length.
  /// Throws Error(kInvalidInput) unless the state has `dims` values.
  [[nodiscard]] std::vector<float> project(std::span<const float> state) const;

  [[nodiscard]] std::int64_t dims() const noexcept { return dims_; }
  [[nodiscard]] std::int64_t components() const noexcept { return components_; }
  [[nodiscard]] std::span<const float> mean() const noexcept { return mean_; }
  /// [components, dims], row by row: orthonormal, most variance first.
  [[nodiscard]] std::span<const float> directions() const noexcept { return directions_; }
  /// Share of the sample's variance that lies along each component, largest first.
  [[nodiscard]] std::span<const float> explained() const noexcept { return explained_; }

 private:
  PcaModel() = default;

  std::int64_t dims_ = 0;
  std::int64_t components_ = 0;
  std::vector<float> mean_;
  std::vector<float> directions_;
  std::vector<float> explained_;
};

}  // namespace llmcache
