#include "../../csrc/cpu/team.h"

#include <atomic>
#include <thread>

#include "harness.h"

// Threads on instructions of many pieces, one of which stops within its first piece and comes back after the end: the
// leader does that piece, each piece is done once, and the late thread learns that its results are not wanted.
void team(Random& random) {
    const int64_t instructions = random.pick({1, 2, 9}), pieces = random.pick({2, 3, 17, 1024});
    const bool stops = random.coin();
    std::vector<int> done(instructions * pieces, 0);
    std::atomic<bool> has_stopped{false}, has_ended{false};
    seqarch::Team team;
    const auto follow = [&] {
        team.follow(
            [&](seqarch::Team::Taken taken) {
                bool expected = false;
                if (stops && has_stopped.compare_exchange_strong(expected, true)) {
                    while (!has_ended) std::this_thread::yield();
                    require(!team.begin(taken.instruction, taken.piece), "a piece that was done is to be done again");
                    return;
                }
                if (!team.begin(taken.instruction, taken.piece)) return;
                ++done[taken.instruction * pieces + taken.piece];
                team.finish(taken.instruction, taken.piece);
            },
            [](int64_t, int64_t) { std::this_thread::yield(); });
    };
    std::vector<std::thread> others;
    for (int64_t i = random.pick({1, 2, 3}); i > 0; --i) others.emplace_back(follow);
    for (int64_t i = 0; i < instructions; ++i) {
        team.open(i, pieces);
        for (int64_t p; (p = team.take_front()) >= 0; team.finish(i, p)) ++done[i * pieces + p];
        team.wait_for(i, pieces, [&](int64_t p) { ++done[i * pieces + p]; });
    }
    team.end();
    has_ended = true;
    for (std::thread& other : others) other.join();
    require(std::all_of(done.begin(), done.end(), [](int count) { return count == 1; }), "a piece is not done once");
}
