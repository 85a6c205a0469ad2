// Threads that share the pieces of one instruction after another, and do not wait for one that is not running.
//
// One thread leads: it goes through the instructions, opens the pieces of one, takes them from the front and goes on
// when all are done. The others take pieces from the back, of whatever instruction is open. A machine that is busy
// stops a thread for a time slice, thousands of times as long as a piece takes. If what it was at can be done again,
// because it writes into room of its own first, the leader does it again and goes on; the other one finds out when it
// would hand its results over. What replaces numbers in place is done by whoever began it. At the end all meet once.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace seqarch {

struct Piece {
    int64_t number, of;
};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

class Team {
public:
    static constexpr int64_t kMostPieces = 1024;

    struct Taken {
        int64_t instruction, piece;
    };

    // The leader's: pieces of an instruction that others may take. Instructions come in their order.
    void open(int64_t instruction, int64_t pieces) {
        for (int64_t p = 0; p < pieces; ++p) states_[p].store(state(instruction, kOpen), std::memory_order_relaxed);
        line_.store(line(instruction, 0, pieces), std::memory_order_release);
    }

    // The next piece from the front; -1 where all are taken.
    int64_t take_front() {
        uint64_t now = line_.load(std::memory_order_relaxed);
        while (front(now) < back(now))
            if (line_.compare_exchange_weak(now, now + kFront, std::memory_order_acquire)) return front(now);
        return -1;
    }

    void finish(int64_t instruction, int64_t piece) {
        states_[piece].store(state(instruction, kDone), std::memory_order_release);
    }

    // Wait until all pieces are done, and do again what another thread does not come back with.
    template <class Again>
    void wait_for(int64_t instruction, int64_t pieces, Again again) {
        for (int64_t p = 0; p < pieces; ++p) {
            const auto start = std::chrono::steady_clock::now();
            for (int64_t turn = 1; states_[p].load(std::memory_order_acquire) != state(instruction, kDone); ++turn) {
                pause();
                if (turn % 64 || std::chrono::steady_clock::now() - start < kPatience) continue;
                if (begin(instruction, p)) {
                    again(p);
                    finish(instruction, p);
                } else {
                    std::this_thread::yield();
                }
            }
        }
    }

    void end() { line_.store(line(kEnd, 0, 0), std::memory_order_release); }

    // Of any thread: whether it is the one that replaces this piece's results.
    bool begin(int64_t instruction, int64_t piece) {
        uint32_t expected = state(instruction, kOpen);
        return states_[piece].compare_exchange_strong(expected, state(instruction, kBegun), std::memory_order_acq_rel);
    }

    // The others': work(taken) on pieces from the back until the end, idle(instruction, turn) while there are none.
    template <class Work, class Idle>
    void follow(Work work, Idle idle) {
        for (int64_t turn = 0;;) {
            uint64_t now = line_.load(std::memory_order_acquire);
            const int64_t instruction = static_cast<int64_t>(now >> 32);
            if (instruction == kEnd) return;
            if (front(now) == back(now)) {
                idle(instruction, turn++);
                continue;
            }
            if (!line_.compare_exchange_weak(now, now - 1, std::memory_order_acquire)) continue;
            work(Taken{instruction, back(now) - 1});
            turn = 0;
        }
    }

private:
    enum State : uint32_t { kOpen, kBegun, kDone };
    static constexpr auto kPatience = std::chrono::microseconds(30);
    static constexpr int64_t kEnd = (int64_t{1} << 30) - 1;
    static constexpr uint64_t kFront = 1 << 16;

    static uint32_t state(int64_t instruction, State what) { return static_cast<uint32_t>(instruction) << 2 | what; }
    static uint64_t line(int64_t instruction, int64_t front, int64_t back) {
        return static_cast<uint64_t>(instruction) << 32 | static_cast<uint64_t>(front) << 16 |
               static_cast<uint64_t>(back);
    }
    static int64_t front(uint64_t line) { return line >> 16 & 0xffff; }
    static int64_t back(uint64_t line) { return line & 0xffff; }

    alignas(64) std::atomic<uint64_t> line_{0};  // the open instruction, and its pieces that nobody has taken
    alignas(64) std::atomic<uint32_t> states_[kMostPieces] = {};
};

}  // namespace seqarch
