// Work on threads that each have buffers of their own.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "buffer.h"
#include "flush_denormals.h"
#include "simd.h"

namespace seqarch {

// body(i) for each i below `count`, in equal shares of consecutive ones. Work on several threads goes through here or
// through what follows, so that none of them computes with denormal numbers; a tape starts its own threads, and so does
// a transposition, which computes nothing.
template <class Body>
void parallel_for(int64_t count, int num_threads, Body body) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        const FlushDenormals flush;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) body(i);
    }
}

// The same, each in turn to whichever thread is free.
template <class Body>
void parallel_tasks(int64_t count, int num_threads, Body body) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        const FlushDenormals flush;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) body(i);
    }
}

// run(task, scratch) for each of `count` tasks, in turn to whichever thread is free; `lay_out` takes a thread's scratch
// from an arena. All memory is taken before the threads start, where a failure can still be reported. Each thread's
// part begins at a line of the cache, so that none writes to a line that another one reads.
template <class A, class LayOut, class Run>
void run_parallel(int64_t count, int num_threads, LayOut lay_out, Run run) {
    const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(count, num_threads)));
    Arena<A> counting;
    lay_out(counting);
    const int64_t each = counting.used;
    if (each > std::numeric_limits<int64_t>::max() / threads) throw std::bad_alloc();
    const Buffer<A> memory(each * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const int own = omp_get_thread_num();
#else
        const int own = 0;
#endif
        const FlushDenormals flush;
        Arena<A> arena(memory + own * each);
        auto scratch = lay_out(arena);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count; ++t) run(t, scratch);
    }
}

}  // namespace seqarch
