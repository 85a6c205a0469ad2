// Memory that kernels work in.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace seqarch {

// Memory for `count` numbers, not set. It begins at a line of the cache, so that no vector of any instruction set lies
// across two, which would take two loads. Throws std::bad_alloc.
template <class A>
class Buffer {
  public:
    explicit Buffer(int64_t count) : data_(static_cast<A*>(::operator new(bytes(count), kAlignment))) {}
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, kAlignment); }
    operator A*() const { return data_; }

  private:
    static size_t bytes(int64_t count) {
        if (count < 0 || count > std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(A)))
            throw std::bad_alloc();
        return static_cast<size_t>(count) * sizeof(A);
    }
    static constexpr std::align_val_t kAlignment{64};
    A* data_;
};

// Memory that is kept from call to call, so that none is asked for once there was enough. Throws std::bad_alloc.
class Kept {
  public:
    uint8_t* at_least(int64_t bytes) {
        if (bytes > bytes_) {
            bytes_ = 0;
            memory_ = std::make_unique<Buffer<uint8_t>>(bytes);
            bytes_ = bytes;
        }
        return memory_ ? static_cast<uint8_t*>(*memory_) : nullptr;
    }

  private:
    std::unique_ptr<Buffer<uint8_t>> memory_;
    int64_t bytes_ = 0;
};

}  // namespace seqarch
