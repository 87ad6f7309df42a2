// Tensors on their way into a snapshot, and out of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "store/snapshot_entries.h"
#include "store/snapshot_file.h"

namespace llmcache {

/// Type and sizes of a tensor; unset if a snapshot cannot hold one like that (quantized, sparse, complex).
[[nodiscard]] std::optional<TensorRecord> record_of(const at::Tensor& tensor);
/// The same of several; unset if that is so of one.
[[nodiscard]] std::optional<std::vector<TensorRecord>> records_of(const std::vector<at::Tensor>& tensors);

/// Writes a frame: `entry`, and behind it the numbers of the tensors that it names. Copies one tensor at a time.
void write_entry(SnapshotWriter& writer, FrameKind kind, const std::string& entry,
                 const std::vector<at::Tensor>& tensors);

/// Appends the same bytes to a text.
void append_entry(std::string& to, const std::string& entry, const std::vector<at::Tensor>& tensors);

/// True if a record is of this type and these sizes.
[[nodiscard]] bool has_form(const TensorRecord& record, at::IntArrayRef sizes, at::ScalarType type);
/// The type of a record's numbers.
[[nodiscard]] at::ScalarType type_of(const TensorRecord& record);
/// A tensor on `device` with the record's numbers.
[[nodiscard]] at::Tensor tensor_of(const TensorRecord& record, at::Device device);
/// Writes them into a view of the record's sizes.
void copy_record(const TensorRecord& record, const at::Tensor& target);

}  // namespace llmcache
