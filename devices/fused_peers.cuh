// Rows on their way to other GPUs' memory (kernels.cl: "between ranks", peer_rows): to all ranks in one
// launch, by few multiprocessors, which is enough to fill NVLink, beside products on the others.
#include "devices/fused.cuh"

enum { PEER_THREADS = 1024, PEERS_MOST = 64, OWN_LANE = 1 + PEERS_MOST, SEGMENT_WORDS = 3 };

INLINE void copy_row(void *to, const void *from, size_t there, size_t here, int vectors)
{
    enum { AHEAD = 5 };
    for (int v = threadIdx.x % WARP; v < vectors; v += AHEAD * WARP) {
        uint4 part[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (v + i * WARP < vectors)
                part[i] = load16(from, here * vectors + v + i * WARP);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (v + i * WARP < vectors)
                store16(to, there * vectors + v + i * WARP, part[i]);
    }
}

// The expert of row `row` of a journey, whose experts' rows begin at first[0..experts].
INLINE int find_expert(const int *first, int experts, int row)
{
    int expert = 0;
    for (int e = 0; e < experts; e += WARP) {
        const int mine = e + threadIdx.x % WARP;
        expert += __popc(__ballot_sync(~0u, mine < experts && first[mine + 1] <= row));
    }
    return expert;
}

// All warps take rows by turns, one for every rank at a time, so that all links are busy together. The last
// block to be done tells all ranks, itself last: when it knows, all that it sent has left.
extern "C" __global__ void __launch_bounds__(PEER_THREADS, 1) peer_rows_all(const peer_rows a)
{
    __shared__ int segments[PEER_TABLE * SEGMENT_WORDS], first[PEER_TABLE + PEER_ROADS];
    const int experts = a.experts, all = a.ranks * experts;
    const int *table = static_cast<const int *>(a.segments) + a.part * experts * SEGMENT_WORDS;
    for (int i = threadIdx.x; i < all * SEGMENT_WORDS; i += PEER_THREADS)
        segments[i] = table[i];
    __syncthreads();
    if (threadIdx.x < a.ranks) {
        int sum = 0;
        for (int e = 0; e < experts; e++) {
            first[threadIdx.x * (experts + 1) + e] = sum;
            sum += segments[(threadIdx.x * experts + e) * SEGMENT_WORDS + 2];
        }
        first[threadIdx.x * (experts + 1) + experts] = sum;
    }
    __syncthreads();
    const int warps = gridDim.x * (PEER_THREADS / WARP);
    const int warp = blockIdx.x * (PEER_THREADS / WARP) + threadIdx.x / WARP;
    int most = 0;
    for (int r = 0; r < a.ranks; r++)
        most = max(most, first[r * (experts + 1) + experts]);
    for (int row = warp; row < most; row += warps)
        for (int i = 1; i <= a.ranks; i++) {
            const int r = (a.rank + i) % a.ranks;
            const int *starts = first + r * (experts + 1);
            if (row >= starts[experts])
                continue;
            const int e = find_expert(starts, experts, row);
            const int *segment = segments + (r * experts + e) * SEGMENT_WORDS, in = row - starts[e];
            int here = segment[0] + in;
            if (a.index)
                here = static_cast<const int *>(a.index)[here];
            copy_row(a.to[r], a.from, segment[1] + in, here, a.vectors);
        }
    __threadfence_system();
    __syncthreads();
    unsigned *own = static_cast<unsigned *>(a.own) + a.lane * OWN_LANE;
    if (threadIdx.x != 0 || atomicAdd(own + 1, 1u) != gridDim.x - 1)
        return;
    own[1] = 0;
    __threadfence_system();
    for (int i = 1; i <= a.ranks; i++) {
        unsigned *words = static_cast<unsigned *>(a.words[(a.rank + i) % a.ranks]);
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(words + a.lane * PEERS_MOST + a.rank),
                     "r"(own[0] + 1)
                     : "memory");
    }
}
