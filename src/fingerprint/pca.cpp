#include "llmcache/fingerprint/pca.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <Eigen/Dense>
#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <system_error>

#include "fingerprint/kernels.h"
#include "llmcache/error.h"
#include "refusal.h"

namespace llmcache {
namespace {

static_assert(std::endian::native == std::endian::little, "PCA files hold numbers as they lie in memory");

// The file, version 1, numbers little-endian:
//   0   8 bytes "LLMCPCA1"
//   8   uint64 dims, uint64 components, uint64 bytes of the digest
//   32  the digest; float32 mean [dims], directions [components, dims], explained [components]
//   end uint64 XXH3 of all bytes before
constexpr char kMagic[] = {'L', 'L', 'M', 'C', 'P', 'C', 'A', '1'};
constexpr std::size_t kMagicKind = 7;  ///< without the version
constexpr std::size_t kHeader = sizeof kMagic + 3 * sizeof(std::uint64_t);
constexpr std::size_t kMaxDigest = 4096;
constexpr std::uint64_t kMaxDims = std::uint64_t{1} << 24;  ///< so that no product of sizes overflows
/// An eigenvalue below this share of the largest one is rounding.
constexpr double kRank = 1e-10;

void put_bytes(std::string& bytes, const void* data, std::size_t size) {
  bytes.append(static_cast<const char*>(data), size);
}

std::uint64_t number_at(const std::string& bytes, std::size_t offset) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

/// Takes `count` floats from `bytes` at `offset`, and moves it on.
std::vector<float> floats_at(const std::string& bytes, std::size_t& offset, std::size_t count) {
  std::vector<float> values(count);
  std::memcpy(values.data(), bytes.data() + offset, count * sizeof(float));
  offset += count * sizeof(float);
  return values;
}

/// A file descriptor that is closed, and a file that is removed unless it was kept.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::filesystem::path& beside) : path_(beside.string() + ".XXXXXX") {
    descriptor_ = ::mkstemp(path_.data());
    if (descriptor_ < 0) fail("make a file beside", beside);
  }
  ~TemporaryFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!kept_) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void write(const std::string& bytes) {
    for (std::size_t done = 0; done < bytes.size();) {
      const ssize_t count = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail("write", path_);
      done += static_cast<std::size_t>(count);
    }
    if (::fchmod(descriptor_, 0644) != 0 || ::fsync(descriptor_) != 0) fail("write", path_);
  }
  void rename_to(const std::filesystem::path& path) {
    if (::rename(path_.c_str(), path.c_str()) != 0) fail("rename a file to", path);
    kept_ = true;
  }

 private:
  [[noreturn]] static void fail(const char* what, const std::filesystem::path& path) {
    refuse_file(fmt::format("cannot {} '{}': {}; check that the folder exists and can be written to", what,
                            path.string(), std::generic_category().message(errno)));
  }

  std::string path_;
  int descriptor_ = -1;
  bool kept_ = false;
};

std::string read_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);  // an error for what is no regular file
  std::string bytes(error ? 0 : size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (error || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    refuse_file(
        fmt::format("cannot read the PCA file '{}'; give the path of a file that PcaModel::save wrote", path.string()));
  }
  return bytes;
}

}  // namespace

PcaModel PcaModel::fit(std::span<const float> rows, std::int64_t dims, std::int64_t components) {
  if (dims < 1 || rows.size() % static_cast<std::size_t>(dims) != 0) {
    refuse_input(fmt::format("PCA sample has {} values, dims is {}; whole rows of dims >= 1 values are expected",
                             rows.size(), dims));
  }
  const std::int64_t count = static_cast<std::int64_t>(rows.size()) / dims;
  if (count < 2) refuse_input(fmt::format("PCA sample has {} rows; at least 2 are expected", count));
  if (components < 1 || components > std::min(dims, count - 1)) {
    throw Error(ErrorCode::kInvalidOptions,
                fmt::format("PCA components is {}; 1 to {} are possible with {} rows of {} values", components,
                            std::min(dims, count - 1), count, dims));
  }
  const auto bad = std::find_if(rows.begin(), rows.end(), [](float value) { return !std::isfinite(value); });
  if (bad != rows.end()) {
    refuse_input(fmt::format("PCA sample row {} has the value {}; leave out rows that are not finite",
                             (bad - rows.begin()) / dims, *bad));
  }

  using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::MatrixXd sample = Eigen::Map<const RowMatrix>(rows.data(), count, dims).cast<double>();
  // The mean as it is stored, so that a projected sample is centred with the very same numbers.
  const Eigen::VectorXf mean = sample.colwise().mean().transpose().cast<float>();
  sample.rowwise() -= mean.cast<double>().transpose();

  const bool gram = count < dims;
  const std::int64_t size = gram ? count : dims;
  Eigen::MatrixXd products = Eigen::MatrixXd::Zero(size, size);
  if (gram) {
    products.selfadjointView<Eigen::Lower>().rankUpdate(sample);
  } else {
    products.selfadjointView<Eigen::Lower>().rankUpdate(sample.transpose());
  }
  const double trace = products.trace();
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(products);  // reads the lower half; smallest first
  if (solver.info() != Eigen::Success)
    refuse_input("PCA did not converge; scale the sample to values of ordinary size");
  const auto& values = solver.eigenvalues();
  const double largest = values[size - 1];

  PcaModel model;
  model.dims_ = dims;
  model.components_ = components;
  model.mean_.assign(mean.data(), mean.data() + dims);
  model.directions_.resize(static_cast<std::size_t>(components * dims));
  for (std::int64_t i = 0; i < components; ++i) {
    const double value = values[size - 1 - i];
    if (!(value > largest * kRank) || !(largest > 0)) {
      refuse_input(
          fmt::format("PCA sample varies in {} directions only, {} components were asked for; use more or other rows",
                      i, components));
    }
    Eigen::VectorXd direction = solver.eigenvectors().col(size - 1 - i);
    if (gram) direction = (sample.transpose() * direction).normalized();
    Eigen::Index peak = 0;
    direction.cwiseAbs().maxCoeff(&peak);
    if (direction[peak] < 0) direction = -direction;
    Eigen::Map<Eigen::VectorXf>(model.directions_.data() + i * dims, dims) = direction.cast<float>();
    model.explained_.push_back(static_cast<float>(value / trace));
  }
  return model;
}

void PcaModel::save(const std::filesystem::path& path, std::string_view model_digest) const {
  if (model_digest.size() > kMaxDigest) {
    refuse_input(
        fmt::format("the model digest has {} bytes; at most {} are possible", model_digest.size(), kMaxDigest));
  }
  std::string bytes(kMagic, sizeof kMagic);
  for (const std::uint64_t number : {static_cast<std::uint64_t>(dims_), static_cast<std::uint64_t>(components_),
                                     std::uint64_t{model_digest.size()}}) {
    put_bytes(bytes, &number, sizeof number);
  }
  bytes += model_digest;
  for (const auto* values : {&mean_, &directions_, &explained_}) {
    put_bytes(bytes, values->data(), values->size() * sizeof(float));
  }
  const std::uint64_t checksum = XXH3_64bits(bytes.data(), bytes.size());
  put_bytes(bytes, &checksum, sizeof checksum);
  TemporaryFile file(path);
  file.write(bytes);
  file.rename_to(path);
}

PcaModel PcaModel::load(const std::filesystem::path& path, std::string_view model_digest, std::int64_t expected_dims) {
  const std::string bytes = read_file(path);
  const auto name = path.string();
  if (bytes.size() < sizeof kMagic || std::memcmp(bytes.data(), kMagic, kMagicKind) != 0) {
    refuse_file(fmt::format("'{}' is no PCA file; give a file that PcaModel::save wrote", name));
  }
  if (bytes[kMagicKind] != kMagic[kMagicKind]) {
    refuse_file(fmt::format("PCA file '{}' has version '{}', this library reads '{}'; fit and save it again", name,
                            bytes[kMagicKind], kMagic[kMagicKind]));
  }
  const auto damaged = [&](const std::string& what) {
    refuse_file(fmt::format("PCA file '{}' is damaged: {}; fit and save it again", name, what));
  };
  if (bytes.size() < kHeader) damaged(fmt::format("it has {} bytes, at least {} are expected", bytes.size(), kHeader));
  const std::uint64_t dims = number_at(bytes, sizeof kMagic);
  const std::uint64_t components = number_at(bytes, sizeof kMagic + 8);
  const std::uint64_t digest_bytes = number_at(bytes, sizeof kMagic + 16);
  if (dims < 1 || dims > kMaxDims || components < 1 || components > dims || digest_bytes > kMaxDigest) {
    damaged(fmt::format("dims {}, components {}, digest of {} bytes", dims, components, digest_bytes));
  }
  const std::uint64_t expected =
      kHeader + digest_bytes + (dims + components * dims + components) * sizeof(float) + sizeof(std::uint64_t);
  if (bytes.size() != expected) damaged(fmt::format("it has {} bytes, {} are expected", bytes.size(), expected));
  const std::size_t content = bytes.size() - sizeof(std::uint64_t);
  if (number_at(bytes, content) != XXH3_64bits(bytes.data(), content)) damaged("the checksum does not match");

  const std::string digest = bytes.substr(kHeader, digest_bytes);
  if (digest != model_digest) {
    refuse_input(
        fmt::format("PCA file '{}' was fitted to the model '{}', this one is '{}'; fit it to states of this model",
                    name, digest, model_digest));
  }
  if (expected_dims != 0 && static_cast<std::int64_t>(dims) != expected_dims) {
    refuse_input(
        fmt::format("PCA file '{}' was fitted to states of {} values, these have {}; fit it to states of this layer",
                    name, dims, expected_dims));
  }
  PcaModel model;
  model.dims_ = static_cast<std::int64_t>(dims);
  model.components_ = static_cast<std::int64_t>(components);
  std::size_t offset = kHeader + digest_bytes;
  model.mean_ = floats_at(bytes, offset, dims);
  model.directions_ = floats_at(bytes, offset, components * dims);
  model.explained_ = floats_at(bytes, offset, components);
  for (const auto* values : {&model.mean_, &model.directions_, &model.explained_}) {
    if (!std::all_of(values->begin(), values->end(), [](float value) { return std::isfinite(value); })) {
      damaged("a value is not finite");
    }
  }
  return model;
}

std::vector<float> PcaModel::project(std::span<const float> state) const {
  const auto dims = static_cast<std::size_t>(dims_);
  if (state.size() != dims) {
    refuse_input(fmt::format("a state of {} values was given; the PCA model was fitted to {}", state.size(), dims));
  }
  std::vector<float> centred(state.begin(), state.end());
  for (std::size_t i = 0; i < dims; ++i) centred[i] -= mean_[i];
  std::vector<float> coordinates(static_cast<std::size_t>(components_));
  for (std::size_t i = 0; i < coordinates.size(); ++i) {
    coordinates[i] = static_cast<float>(detail::dot(directions_.data() + i * dims, centred.data(), dims));
  }
  return coordinates;
}

}  // namespace llmcache
