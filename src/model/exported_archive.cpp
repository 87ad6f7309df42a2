#include "model/exported_archive.h"

#include <ATen/ATen.h>
#include <c10/core/Storage.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "model/exported_json.h"
#include "model/exported_weights.h"
#include "store/bounded_json.h"
#include "store/damaged_data.h"

namespace llmcache::exported {
namespace {

using Reader = caffe2::serialize::PyTorchStreamReader;

constexpr const char* kFormat = "archive_format";

/// A record's bytes. No record is larger than the archive: torch.export.save() does not compress.
std::tuple<at::DataPtr, std::size_t> record_of(Reader& reader, const std::string& name, std::size_t archive_bytes) {
  if (!reader.hasRecord(name)) throw DamagedData(fmt::format("the archive has no '{}'", shown(name)));
  if (reader.getRecordSize(name) > archive_bytes) {
    throw DamagedData(fmt::format("'{}' would be larger than the archive that it is in", shown(name)));
  }
  return reader.getRecord(name);
}

std::string text_record(Reader& reader, const std::string& name, std::size_t archive_bytes) {
  const auto [data, size] = record_of(reader, name, archive_bytes);
  return {static_cast<const char*>(data.get()), size};
}

/// A ZIP archive that LibTorch wrote ends in a record of 22 bytes; one that was cut does not. LibTorch's reader would
/// say so less plainly, and only after a long search.
void check_end(const ReadAdapter& bytes) {
  constexpr std::size_t kEnd = 22;
  std::array<char, kEnd> end{};
  const std::size_t size = bytes.size();
  const bool whole = size >= kEnd && bytes.read(size - kEnd, end.data(), kEnd, "") == kEnd &&
                     std::string_view(end.data(), 4) == std::string_view("PK\5\6", 4);
  if (!whole) throw DamagedData("it is no archive, or its end is missing");
}

constexpr std::string_view kPrograms = "models/";

bool says_pt2(Reader& reader, std::size_t archive_bytes) {
  return reader.hasRecord(kFormat) && text_record(reader, kFormat, archive_bytes) == "pt2";
}

/// The one program of the archive.
std::string program_record(Reader& reader) {
  std::vector<std::string> programs;
  bool compiled = false;
  for (const std::string& name : reader.getAllRecords()) {
    if (name.rfind(kPrograms, 0) == 0) programs.push_back(name);
    compiled = compiled || name.find("aotinductor") != std::string::npos;
  }
  if (programs.empty() && compiled) {
    throw Refused(
        "it is a package of AOTInductor, whose layers are compiled into one function: save the program with "
        "torch.export.save() instead of torch._inductor.aoti_compile_and_package()");
  }
  if (programs.empty()) throw DamagedData("the archive has no program below 'models/'");
  if (programs.size() > 1) {
    throw Refused(fmt::format("the archive has {} programs: save each in a file of its own", programs.size()));
  }
  return programs[0];
}

/// "bert" of "models/bert.json".
std::string name_of_program(const std::string& record) {
  constexpr std::string_view kEnd = ".json";
  std::string name = record.substr(kPrograms.size());
  if (name.size() < kEnd.size() || name.substr(name.size() - kEnd.size()) != kEnd) {
    throw DamagedData(fmt::format("its program '{}' is no JSON file", shown(record)));
  }
  return name.substr(0, name.size() - kEnd.size());
}

/// The tensors of a folder of the archive.
class TensorReader {
 public:
  TensorReader(Reader& reader, std::size_t archive_bytes, at::Device device)
      : reader_(reader), archive_bytes_(archive_bytes), device_(device) {}

  void read(const std::string& folder, const std::string& config, std::map<std::string, at::Tensor>& tensors) {
    if (!reader_.hasRecord(folder + config)) return;
    for (const auto& [name, stored] : parse_weights(text_record(reader_, folder + config, archive_bytes_))) {
      tensors[name] = tensor_of(name, stored, storage_of(folder + stored.file));
    }
  }

 private:
  /// Read once, and moved as a whole, so that what shares memory goes on to.
  const at::Storage& storage_of(const std::string& file) {
    if (const auto known = storages_.find(file); known != storages_.end()) return known->second;
    auto [data, size] = record_of(reader_, file, archive_bytes_);
    at::Storage storage(at::Storage::use_byte_size_t(), static_cast<std::int64_t>(size), std::move(data),
                        /*allocator=*/nullptr, /*resizable=*/false);
    if (!device_.is_cpu()) {
      const auto bytes =
          at::empty({0}, at::TensorOptions().dtype(at::kByte)).set_(storage, 0, {static_cast<std::int64_t>(size)}, {1});
      storage = bytes.to(device_).storage();
    }
    return storages_.emplace(file, std::move(storage)).first->second;
  }

  at::Tensor tensor_of(const std::string& name, const StoredTensor& stored, const at::Storage& storage) {
    const at::ScalarType type = scalar_type_of(stored.scalar_type);
    const auto width = static_cast<std::int64_t>(c10::elementSize(type));
    const auto bytes = static_cast<std::int64_t>(storage.nbytes());
    if (numbers_needed(stored) > bytes / width) {
      throw DamagedData(fmt::format("the weight '{}' is larger than its file '{}'", shown(name), shown(stored.file)));
    }
    count(name, stored);
    return at::empty({0}, at::TensorOptions().dtype(type).device(device_))
        .set_(storage, stored.offset, stored.sizes, stored.strides);
  }

  /// By strides, few numbers may stand for any number of them, all of which are looked at when the model is wrapped.
  void count(const std::string& name, const StoredTensor& stored) {
    constexpr std::int64_t kExpanded = std::int64_t{1} << 24;
    constexpr std::int64_t kTied = 4;
    std::int64_t numbers = 1;
    for (const std::int64_t size : stored.sizes) numbers *= size;  // parse_weights() has looked whether they fit
    numbers_ += numbers;
    if (numbers_ <= kExpanded + kTied * static_cast<std::int64_t>(archive_bytes_)) return;
    throw DamagedData(fmt::format("its weights up to '{}' have {} numbers, in an archive of {} bytes", shown(name),
                                  numbers_, archive_bytes_));
  }

  Reader& reader_;
  std::size_t archive_bytes_;
  at::Device device_;
  std::int64_t numbers_ = 0;
  std::map<std::string, at::Storage> storages_;
};

}  // namespace

at::ScalarType scalar_type_of(std::int64_t code) {
  constexpr std::array<std::pair<std::int64_t, at::ScalarType>, 10> kTypes{{{1, at::kByte},
                                                                            {2, at::kChar},
                                                                            {3, at::kShort},
                                                                            {4, at::kInt},
                                                                            {5, at::kLong},
                                                                            {6, at::kHalf},
                                                                            {7, at::kFloat},
                                                                            {8, at::kDouble},
                                                                            {12, at::kBool},
                                                                            {13, at::kBFloat16}}};
  const auto* found = std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& type) { return type.first == code; });
  if (found != kTypes.end()) return found->second;
  throw Refused(
      fmt::format("it has numbers of the type {} of torch's ScalarType: whole numbers of up to 64 bits, bool, "
                  "float16, bfloat16, float32 and float64 are taken",
                  code));
}

bool is_exported_archive(const std::filesystem::path& path) {
  try {
    Reader reader(path.string());
    return says_pt2(reader, std::filesystem::file_size(path));
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception&) {
    return false;
  }
}

Archive read_archive(std::shared_ptr<ReadAdapter> bytes, at::Device device) {
  check_end(*bytes);
  const std::size_t size = bytes->size();
  Reader reader(std::move(bytes));
  if (!says_pt2(reader, size)) throw DamagedData("the archive was not written by torch.export.save()");
  if (reader.hasRecord("byteorder") && text_record(reader, "byteorder", size) != "little") {
    throw Refused("its numbers have the bytes of another kind of machine (big endian)");
  }
  Archive archive;
  const std::string record = program_record(reader);
  const std::string name = name_of_program(record);
  archive.program = text_record(reader, record, size);
  TensorReader tensors(reader, size, device);
  tensors.read("data/weights/", name + "_weights_config.json", archive.tensors);
  tensors.read("data/constants/", name + "_constants_config.json", archive.tensors);
  return archive;
}

}  // namespace llmcache::exported
