// ---- matrix products -----------------------------------------------------------------------------------
//
// Every form of struct gemm (devices/device.h): C[m,n] (+)= op(A) op(B) (+ bias), plain or ragged.
// `flags` says the storage of the operands and whether to add to C (devices/opencl_gemm.c sets them):
#define GEMM_ACCUMULATE 1
#define GEMM_A_BF16 2
#define GEMM_B_BF16 4
#define GEMM_C_BF16 8

inline float gemm_load(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? bf16_to_float(((const GLOBAL ushort *)p)[i]) : ((const GLOBAL float *)p)[i];
}

inline void gemm_store(GLOBAL void *c, size_t i, float v, int flags)
{
    if (flags & GEMM_ACCUMULATE)
        v += gemm_load(c, i, flags & GEMM_C_BF16);
    if (flags & GEMM_C_BF16)
        ((GLOBAL ushort *)c)[i] = float_to_bf16(v);
    else
        ((GLOBAL float *)c)[i] = v;
}

// The rows [return, *end) of block `block`, when the rows of every group are cut into blocks of
// `size` rows; *group is set. Past the last block the range is empty. Without offsets: one group.
inline int gemm_block(const GLOBAL int *offsets, int groups, int block, int size, int m, int *group,
                      int *end)
{
    *group = 0;
    if (!offsets) {
        int first = block * size;
        *end = first + size < m ? first + size : m;
        return first;
    }
    for (int g = 0; g < groups; g++) {
        int first = offsets[g] + block * size, last = offsets[g + 1];
        if (first < last) {
            *group = g;
            *end = first + size < last ? first + size : last;
            return first;
        }
        block -= (last - offsets[g] + size - 1) / size;
    }
    *end = 0;
    return 0;
}

// ---- matrix products: the GPU form
//
// A work-group of 16x16 items makes a tile of 128x64, an item 8x4 of it: rows y, y+16..., columns x,
// x+16..., so that neighbours read neighbouring words of local memory and write neighbouring words
// of C. K goes in steps of 16 through local memory, whose rows are padded by 2 words: the loads that
// run along K then hit 32 different banks.
enum { GEMM_TM = 128, GEMM_TN = 64, GEMM_TK = 16, GEMM_PM = 130, GEMM_PN = 66 };

// Brings the step [k0, k0+16) of `width` rows (or columns) from `first` of an operand into `tile`
// [16][pitch]. along_k: the operand is stored with k running fastest, `ld` elements a row.
// Elements outside [.., last) x [.., k_end) become zero.
inline void gemm_fetch(LOCAL_PTR float *tile, const GLOBAL void *p, int bf16, int along_k, size_t ld,
                       int first, int last, int width, int pitch, int k0, int k_end, int item)
{
    for (int i = item; i < width * GEMM_TK; i += 256) {
        int k = along_k ? i % GEMM_TK : i / width, r = along_k ? i / GEMM_TK : i % width;
        int row = first + r, col = k0 + k;
        float v = 0.0f;
        if (row < last && col < k_end)
            v = gemm_load(p, along_k ? (size_t)row * ld + col : (size_t)col * ld + row, bf16);
        tile[k * pitch + r] = v;
    }
}

// Tile of rows [row0, row_end), columns from col0, summed over [k0, k_end). A and B are stored with k
// running fastest where a_along_k, b_along_k (constants at every call).
inline void gemm_tile(LOCAL_PTR float *ta, LOCAL_PTR float *tb, const GLOBAL void *a, int a_along_k,
                      size_t lda, const GLOBAL void *b, int b_along_k, size_t ldb, GLOBAL void *c,
                      const GLOBAL float *bias, int row0, int row_end, int col0, int n, int k0,
                      int k_end, int flags)
{
    int x = (int)get_local_id(0), y = (int)get_local_id(1), item = y * 16 + x;
    float acc[8][4];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++)
            acc[i][j] = 0.0f;
    for (int k = k0; k < k_end; k += GEMM_TK) {
        gemm_fetch(ta, a, flags & GEMM_A_BF16, a_along_k, lda, row0, row_end, GEMM_TM, GEMM_PM, k,
                   k_end, item);
        gemm_fetch(tb, b, flags & GEMM_B_BF16, b_along_k, ldb, col0, n, GEMM_TN, GEMM_PN, k, k_end,
                   item);
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int s = 0; s < GEMM_TK; s++) {
            float av[8], bv[4];
            for (int i = 0; i < 8; i++)
                av[i] = ta[s * GEMM_PM + y + 16 * i];
            for (int j = 0; j < 4; j++)
                bv[j] = tb[s * GEMM_PN + x + 16 * j];
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 4; j++)
                    acc[i][j] = fma(av[i], bv[j], acc[i][j]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    for (int i = 0; i < 8; i++) {
        int row = row0 + y + 16 * i;
        for (int j = 0; j < 4; j++) {
            int col = col0 + x + 16 * j;
            if (row < row_end && col < n)
                gemm_store(c, (size_t)row * n + col, acc[i][j] + (bias ? bias[col] : 0.0f), flags);
        }
    }
}

// C = A B^T: A [m,k], B [groups][n,k]; ragged over the rows of A where there are offsets.
// Groups: (columns / 64, row blocks of 128: m / 128 + number of groups).
KERNEL(16, 16)
void gemm_nt(const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c, const GLOBAL float *bias,
             const GLOBAL int *offsets, int groups, int m, int n, int k, int flags)
{
    LOCAL float ta[GEMM_TK * GEMM_PM], tb[GEMM_TK * GEMM_PN];
    int group, end;
    int row0 = gemm_block(offsets, groups, (int)get_group_id(1), GEMM_TM, m, &group, &end);
    if (row0 >= end)
        return;
    size_t skip = (size_t)group * n * k;
    const GLOBAL void *bg = flags & GEMM_B_BF16 ? (const GLOBAL void *)((const GLOBAL ushort *)b + skip)
                                                : (const GLOBAL void *)(b + skip);
    gemm_tile(ta, tb, a, 1, k, bg, 1, k, c, bias, row0, end, (int)get_group_id(0) * GEMM_TN, n, 0, k,
              flags);
}

// C = A B: A [m,k], B [groups][k,n]. Groups as gemm_nt.
KERNEL(16, 16)
void gemm_nn(const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c, const GLOBAL float *bias,
             const GLOBAL int *offsets, int groups, int m, int n, int k, int flags)
{
    LOCAL float ta[GEMM_TK * GEMM_PM], tb[GEMM_TK * GEMM_PN];
    int group, end;
    int row0 = gemm_block(offsets, groups, (int)get_group_id(1), GEMM_TM, m, &group, &end);
    if (row0 >= end)
        return;
    size_t skip = (size_t)group * n * k;
    const GLOBAL void *bg = flags & GEMM_B_BF16 ? (const GLOBAL void *)((const GLOBAL ushort *)b + skip)
                                                : (const GLOBAL void *)(b + skip);
    gemm_tile(ta, tb, a, 1, k, bg, 0, n, c, bias, row0, end, (int)get_group_id(0) * GEMM_TN, n, 0, k,
              flags);
}

// C[group] = A^T B: A [k,m], B [k,n], summed over the group's rows (all k rows without offsets).
// Groups: (columns / 64, rows / 128, number of groups).
KERNEL(16, 16)
void gemm_tn(const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c, const GLOBAL float *bias,
             const GLOBAL int *offsets, int groups, int m, int n, int k, int flags)
{
    LOCAL float ta[GEMM_TK * GEMM_PM], tb[GEMM_TK * GEMM_PN];
    int group = (int)get_group_id(2);
    int k0 = offsets ? offsets[group] : 0, k_end = offsets ? offsets[group + 1] : k;
    size_t skip = (size_t)group * m * n;
    GLOBAL void *cg = flags & GEMM_C_BF16 ? (GLOBAL void *)((GLOBAL ushort *)c + skip)
                                          : (GLOBAL void *)(c + skip);
    gemm_tile(ta, tb, a, 0, m, b, 0, n, cg, bias, (int)get_group_id(1) * GEMM_TM, m,
              (int)get_group_id(0) * GEMM_TN, n, k0, k_end, flags);
}

// ---- matrix products: column sums (the gradient of a bias)
//
// part[chunk, n] = sum of rows [chunk*rows, (chunk+1)*rows) of a[m,n]; then column_sums adds up the
// parts in a fixed order. Groups: (n / 64, chunks); (n / 64).
KERNEL(64, 1)
void column_sums_part(GLOBAL float *part, const GLOBAL float *a, int bf16, int m, int n, int rows)
{
    int col = (int)get_global_id(0), chunk = (int)get_group_id(1);
    if (col >= n)
        return;
    int first = chunk * rows, last = first + rows < m ? first + rows : m;
    float sum = 0.0f;
    for (int i = first; i < last; i++)
        sum += gemm_load(a, (size_t)i * n + col, bf16);
    part[(size_t)chunk * n + col] = sum;
}

#ifdef CPU_FORMS
// Groups: (1, chunks).
KERNEL(1, 1)
void column_sums_part_cpu(GLOBAL float *part, const GLOBAL float *a, int bf16, int m, int n, int rows)
{
    int chunk = (int)get_group_id(1), col = 0;
    int first = chunk * rows, last = first + rows < m ? first + rows : m;
    part += (size_t)chunk * n;
    for (; col + 64 <= n; col += 64) {
        float16 sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int i = first; i < last; i++) {
            size_t at = (size_t)i * n + col;
            if (bf16) {
                const GLOBAL ushort *p = (const GLOBAL ushort *)a + at;
                sum0 += bf16_to_float16(vload16(0, p));
                sum1 += bf16_to_float16(vload16(1, p));
                sum2 += bf16_to_float16(vload16(2, p));
                sum3 += bf16_to_float16(vload16(3, p));
            } else {
                sum0 += vload16(0, a + at);
                sum1 += vload16(1, a + at);
                sum2 += vload16(2, a + at);
                sum3 += vload16(3, a + at);
            }
        }
        vstore16(sum0, 0, part + col);
        vstore16(sum1, 1, part + col);
        vstore16(sum2, 2, part + col);
        vstore16(sum3, 3, part + col);
    }
    for (; col < n; col++) {
        float sum = 0.0f;
        for (int i = first; i < last; i++)
            sum += gemm_load(a, (size_t)i * n + col, bf16);
        part[col] = sum;
    }
}
#endif

// out[n] += sum over chunks of part[chunks, n]
KERNEL(64, 1)
void column_sums(GLOBAL float *out, const GLOBAL float *part, int chunks, int n)
{
    int col = (int)get_global_id(0);
    if (col >= n)
        return;
    float sum = 0.0f;
    for (int i = 0; i < chunks; i++)
        sum += part[(size_t)i * n + col];
    out[col] += sum;
}

#ifdef CPU_FORMS
// ---- matrix products: the CPU form
//
// One work-item is one work-group. B is packed into panels of GEMM_NR columns, [panel][k][GEMM_NR]
// f32, so that a step of k is two vector loads; a tile of GEMM_MR rows by one panel lives in
// registers (12 x 2 of the 32 AVX-512 registers; 6 x 2 of the 16 AVX2 ones). A work-item copies each
// strip of GEMM_MR rows of A, GEMM_DEPTH of k at a time, into private memory, which stays in the
// first-level cache, and takes it through all panels of its block of C.
#ifndef VECTOR_WIDTH
#define VECTOR_WIDTH 16
#endif
#if VECTOR_WIDTH >= 16
typedef float16 vec;
#define VLOAD(p) vload16(0, p)
#define VSTORE(v, p) vstore16(v, 0, p)
enum { GEMM_VW = 16, GEMM_MR = 12, GEMM_NR = 32 };
inline vec gemm_bf16_vec(const GLOBAL ushort *p)
{
    return as_float16(convert_uint16(vload16(0, p)) << 16);
}
inline void gemm_vec_bf16(vec v, GLOBAL ushort *p)
{
    vstore16(float16_to_bf16(v), 0, p);
}
#else
typedef float8 vec;
#define VLOAD(p) vload8(0, p)
#define VSTORE(v, p) vstore8(v, 0, p)
enum { GEMM_VW = 8, GEMM_MR = 6, GEMM_NR = 16 };
inline vec gemm_bf16_vec(const GLOBAL ushort *p)
{
    return as_float8(convert_uint8(vload8(0, p)) << 16);
}
inline void gemm_vec_bf16(vec v, GLOBAL ushort *p)
{
    float16 wide = (float16)(v, v);
    vstore8(float16_to_bf16(wide).lo, 0, p);
}
#endif

// GEMM_PITCH: elements from row to row of a strip; a power of two would use few sets of the cache.
// GEMM_ROWS: GEMM_MR as the tails count it, in fours.
enum { GEMM_DEPTH = 384, GEMM_PITCH = GEMM_DEPTH + 16, GEMM_ROWS = (GEMM_MR + 3) / 4 * 4 };
#define GEMM_STRIP(name) float name[GEMM_ROWS * GEMM_PITCH] __attribute__((aligned(64)))

// A call with constant distances must become code with constant addresses.
#define ALWAYS_INLINE inline __attribute__((always_inline))

inline vec gemm_load_vec(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? gemm_bf16_vec((const GLOBAL ushort *)p + i) : VLOAD((const GLOBAL float *)p + i);
}

// Asks for a cache line ahead of its use. The built-in takes no __global pointer; on a CPU device all
// memory is the host's.
#ifdef __clang__
#define GEMM_PREFETCH(p) __builtin_prefetch((const void *)(size_t)(p))
#else
#define GEMM_PREFETCH(p)
#endif

// Elements from panel to panel: an odd number of cache lines, for the same reason.
inline size_t gemm_panel_pitch(int k)
{
    return (size_t)k * GEMM_NR + 16;
}

// strip[i][GEMM_PITCH] = `rows` rows of `k` elements of A; zeros up to a multiple of 4 rows.
inline void gemm_take_rows(float *strip, const GLOBAL void *a, size_t at, size_t lda, int rows, int k,
                           int bf16)
{
    for (int i = 0; i < rows; i++, at += lda, strip += GEMM_PITCH) {
        int s = 0;
        for (; s + GEMM_VW <= k; s += GEMM_VW)
            VSTORE(gemm_load_vec(a, at + s, bf16), strip + s);
        for (; s < k; s++)
            strip[s] = gemm_load(a, at + s, bf16);
    }
    for (int i = rows; i % 4; i++, strip += GEMM_PITCH)
        for (int s = 0; s < k; s++)
            strip[s] = 0.0f;
}

// strip[s][GEMM_MR] = `k` rows of `rows` elements of A, stored [k,m]; zeros up to GEMM_MR.
inline void gemm_take_columns(float *strip, const GLOBAL void *a, size_t at, size_t m, int rows, int k,
                              int bf16)
{
    for (int s = 0; s < k; s++, at += m, strip += GEMM_MR) {
        if (rows == GEMM_MR && !bf16) {
            const GLOBAL float *p = (const GLOBAL float *)a + at;
#if VECTOR_WIDTH >= 16
            vstore8(vload8(0, p), 0, strip);
            vstore4(vload4(0, p + 8), 0, strip + 8);
#else
            vstore4(vload4(0, p), 0, strip);
            vstore2(vload2(0, p + 4), 0, strip + 4);
#endif
        } else if (rows == GEMM_MR) {
            const GLOBAL ushort *p = (const GLOBAL ushort *)a + at;
#if VECTOR_WIDTH >= 16
            vstore8(as_float8(convert_uint8(vload8(0, p)) << 16), 0, strip);
            vstore4(as_float4(convert_uint4(vload4(0, p + 8)) << 16), 0, strip + 8);
#else
            vstore4(as_float4(convert_uint4(vload4(0, p)) << 16), 0, strip);
            vstore2(as_float2(convert_uint2(vload2(0, p + 4)) << 16), 0, strip + 4);
#endif
        } else {
            for (int i = 0; i < GEMM_MR; i++)
                strip[i] = i < rows ? gemm_load(a, at + i, bf16) : 0.0f;
        }
    }
}

// tile[GEMM_MR][2] (vectors) = sum over k of a[i*row + k*step] * b[k*b_step][GEMM_NR]
ALWAYS_INLINE void gemm_multiply(vec *tile, const float *a, int row, int step, const GLOBAL float *b,
                                 int b_step, int k)
{
    vec acc[GEMM_MR][2];
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++)
        acc[i][0] = acc[i][1] = 0.0f;
    const GLOBAL float *ahead = b + 16 * (size_t)b_step;
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < GEMM_MR; i++) {
            vec v = a[i * row];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        GEMM_PREFETCH(ahead);
        GEMM_PREFETCH(ahead + GEMM_VW);
        ahead += b_step;
        b += b_step;
    }
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++) {
        tile[2 * i] = acc[i][0];
        tile[2 * i + 1] = acc[i][1];
    }
}

// The same for 4 rows: the ends of blocks.
ALWAYS_INLINE void gemm_multiply_tail(vec *tile, const float *a, int row, int step, const GLOBAL float *b,
                                      int b_step, int k)
{
    vec acc[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        acc[i][0] = acc[i][1] = 0.0f;
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            vec v = a[i * row];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        b += b_step;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        tile[2 * i] = acc[i][0];
        tile[2 * i + 1] = acc[i][1];
    }
}

// B is not packed: it is stored [k,n] in f32 and n is whole panels.
#define GEMM_B_IN_PLACE 64

// SwiGLU within the product (devices/device.h), n and n/2 being whole panels.
// Forward: half a panel is columns of g, the other half those of u that belong to them.
#define GEMM_SWIGLU_FORWARD 128
#define GEMM_SWIGLU_BACKWARD 256

// Where the sums of one step of k go. K is cut into steps, and between two of them the sums lie in
// `sums`, which is f32: C itself or, where C is bf16, a matrix of C's shape in scratch memory.
#define GEMM_FIRST 16 // of the steps: add the bias and, if asked, C; else the sums so far
#define GEMM_LAST 32  // write C; else the sums

// Writes `rows` rows of `cols` columns of a tile (two vectors a row).
inline void gemm_write_tile(const vec *tile, GLOBAL void *c, GLOBAL float *sums, size_t at,
                            size_t ldc, int rows, int cols, const GLOBAL float *bias, int flags)
{
    int bf16_in = flags & GEMM_FIRST ? flags & GEMM_C_BF16 : 0;
    int bf16_out = flags & GEMM_LAST ? flags & GEMM_C_BF16 : 0;
    int add = !(flags & GEMM_FIRST) || (flags & GEMM_ACCUMULATE);
    const GLOBAL void *in = flags & GEMM_FIRST ? c : (GLOBAL void *)sums;
    GLOBAL void *out = flags & GEMM_LAST ? c : (GLOBAL void *)sums;
    if (!(flags & GEMM_FIRST))
        bias = 0;
    for (int i = 0; i < rows; i++, at += ldc, tile += 2) {
        int j = 0;
        for (; j + GEMM_VW <= min(cols, (int)GEMM_NR); j += GEMM_VW) {
            vec v = tile[j / GEMM_VW];
            if (bias)
                v += VLOAD(bias + j);
            if (add)
                v += gemm_load_vec(in, at + j, bf16_in);
            if (bf16_out)
                gemm_vec_bf16(v, (GLOBAL ushort *)out + at + j);
            else
                VSTORE(v, (GLOBAL float *)out + at + j);
        }
        for (; j < min(cols, (int)GEMM_NR); j++) {
            float v = ((const float *)tile)[j] + (bias ? bias[j] : 0.0f);
            if (add)
                v += gemm_load(in, at + j, bf16_in);
            gemm_store(out, at + j, v, bf16_out);
        }
    }
}

inline void gemm_store_vec(GLOBAL void *p, size_t i, vec v, int bf16)
{
    if (bf16)
        gemm_vec_bf16(v, (GLOBAL ushort *)p + i);
    else
        VSTORE(v, (GLOBAL float *)p + i);
}

inline vec gemm_sigmoid(vec v)
{
#if VECTOR_WIDTH >= 16
    return sigmoid16(v);
#else
    return sigmoid16((float16)(v, v)).lo;
#endif
}

// The last step of SWIGLU_FORWARD: a tile is g and u of half a panel. ldh = F; `at` is the place in h,
// row + at that in c.
inline void gemm_write_swiglu(const vec *tile, GLOBAL void *c, GLOBAL void *h, size_t at, size_t row,
                              size_t ldh, int rows, int bf16)
{
    for (int i = 0; i < rows; i++, at += ldh, row += ldh) {
        vec g = tile[2 * i], u = tile[2 * i + 1];
        gemm_store_vec(h, at, g * gemm_sigmoid(g) * u, bf16);
        if (c) {
            gemm_store_vec(c, row + at, g, bf16);
            gemm_store_vec(c, row + at + ldh, u, bf16);
        }
    }
}

// The last step of SWIGLU_BACKWARD: a tile is dh; g at `at` of c and u `ld` further on become dg, du.
inline void gemm_write_swiglu_bwd(const vec *tile, GLOBAL void *c, size_t at, size_t ld, int rows,
                                  int bf16)
{
    for (int i = 0; i < rows; i++, at += 2 * ld)
        for (int j = 0; j < 2; j++) {
            size_t to = at + j * GEMM_VW;
            vec g = gemm_load_vec(c, to, bf16), u = gemm_load_vec(c, to + ld, bf16);
            vec s = gemm_sigmoid(g), ds = tile[2 * i + j] * s;
            gemm_store_vec(c, to, ds * u * fma(g, 1.0f - s, (vec)(1.0f)), bf16);
            gemm_store_vec(c, to + ld, ds * g, bf16);
        }
}

// Writes a tile whose first element is C[row, col] = C[at] (or its place in the sums).
inline void gemm_finish_tile(vec *tile, GLOBAL void *c, GLOBAL float *sums, GLOBAL void *h, size_t at,
                             int col, int n, int rows, const GLOBAL float *bias, int flags)
{
    int swiglu = flags & (GEMM_SWIGLU_FORWARD | GEMM_SWIGLU_BACKWARD);
    if (!swiglu || !(flags & GEMM_LAST)) {
        gemm_write_tile(tile, c, sums, at + col, n, rows, n - col, bias ? bias + col : bias, flags);
        return;
    }
    if (!(flags & GEMM_FIRST))
        for (int i = 0; i < rows; i++) {
            tile[2 * i] += VLOAD(sums + at + col + (size_t)i * n);
            tile[2 * i + 1] += VLOAD(sums + at + col + (size_t)i * n + GEMM_VW);
        }
    if (swiglu == GEMM_SWIGLU_FORWARD)
        gemm_write_swiglu(tile, c, h, at / 2 + col / 2, at / 2, n / 2, rows, flags & GEMM_C_BF16);
    else
        gemm_write_swiglu_bwd(tile, c, 2 * at + col, n, rows, flags & GEMM_C_BF16);
}

// Asks for what a later tile, `next` elements on from C[at], will be added to or made from: from far
// away, it takes as long as many steps of k.
inline void gemm_ask_tile(const GLOBAL float *c, const GLOBAL float *sums, size_t at, size_t next,
                          size_t n, int flags)
{
    size_t step = n;
    if ((flags & (GEMM_FIRST | GEMM_LAST)) == (GEMM_FIRST | GEMM_LAST)) {
        if (flags & GEMM_SWIGLU_FORWARD)
            return; // nothing
        if (flags & GEMM_SWIGLU_BACKWARD) {
            sums = c + at;
            next += next < n ? 0 : GEMM_MR * n;
            step = 2 * n;
            for (size_t i = 0; i < GEMM_MR; i++) {
                GEMM_PREFETCH(sums + at + next + n + i * step);
                GEMM_PREFETCH(sums + at + next + n + i * step + GEMM_VW);
            }
        }
    }
    for (size_t i = 0; i < GEMM_MR; i++) {
        GEMM_PREFETCH(sums + at + next + i * step);
        GEMM_PREFETCH(sums + at + next + i * step + GEMM_VW);
    }
}

// One strip of `rows` rows, through the panels [first, last) of B at its step of k. row and step:
// distances in the strip (constants at every call).
ALWAYS_INLINE void gemm_strip(const float *strip, int row, int step, const GLOBAL float *b, int b_step,
                              size_t pitch,
                              GLOBAL void *c, GLOBAL float *sums, GLOBAL void *h, size_t at, int n,
                              int rows, int first, int last, const GLOBAL float *bias, int k,
                              int flags)
{
    vec tile[GEMM_ROWS * 2];
    for (int p = first; p < last; p++) {
        int col = p * GEMM_NR;
        int next = p + 1 < last ? col + GEMM_NR : first * GEMM_NR + GEMM_MR * n;
        gemm_ask_tile(c, sums, at, next, n, flags);
        if (rows == GEMM_MR)
            gemm_multiply(tile, strip, row, step, b + p * pitch, b_step, k);
        else
            for (int i = 0; i < rows; i += 4)
                gemm_multiply_tail(tile + i * 2, strip + i * row, row, step, b + p * pitch, b_step, k);
        gemm_finish_tile(tile, c, sums, h, at, col, n, rows, bias, flags);
    }
}

// Work-items are as many as cores and take the blocks of a product by turns. A runtime hands out
// work-groups in large shares (PoCL: half of what is left), and blocks differ: an expert's last one is
// small, a core is slow for a while; with shares one core would wait for the other.
// turns[0]: the next block; turns[1]: work-items that are through. The last sets both back to 0.
inline int gemm_next_block(volatile GLOBAL int *turns)
{
    return atomic_inc(turns);
}

inline void gemm_no_more_blocks(volatile GLOBAL int *turns)
{
    if (atomic_inc(turns + 1) == (int)get_num_groups(0) - 1) {
        atomic_xchg(turns, 0);
        atomic_xchg(turns + 1, 0);
    }
}

// C = A B over blocks of `block` rows and `wide` panels: the parts of the panels that a step of k
// needs stay in the cache while all strips pass. A [m,k]; B packed, [groups] of them; ragged over
// rows where there are offsets; `sums` as above, from element 16*skip of its buffer on.
// depth <= GEMM_DEPTH.
// Blocks: x, rows: m / block + number of groups; y, panels / wide.
inline void gemm_rows_block(float *strip, const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c,
                            GLOBAL float *sums, GLOBAL float *h, const GLOBAL float *bias,
                            const GLOBAL int *offsets, int groups, int x, int y, int m, int n, int k,
                            int skip, int block, int wide, int depth, int flags)
{
    int group, end, panels = (n + GEMM_NR - 1) / GEMM_NR, k0 = 0;
    int row0 = gemm_block(offsets, groups, x, block, m, &group, &end);
    int first = y * wide, last = min(first + wide, panels);
    int b_step = flags & GEMM_B_IN_PLACE ? n : (int)GEMM_NR;
    size_t pitch = flags & GEMM_B_IN_PLACE ? (size_t)GEMM_NR : gemm_panel_pitch(k);
    if (row0 >= end)
        return;
    b += (size_t)group * (flags & GEMM_B_IN_PLACE ? (size_t)n * k : panels * pitch);
    sums += (size_t)skip * 16;
    flags |= GEMM_FIRST;
    do {
        int steps = min(depth, k - k0);
        if (k0 + steps == k)
            flags |= GEMM_LAST;
        for (int i = row0; i < end; i += GEMM_MR) {
            int rows = min((int)GEMM_MR, end - i);
            gemm_take_rows(strip, a, (size_t)i * k + k0, k, rows, steps, flags & GEMM_A_BF16);
            gemm_strip(strip, GEMM_PITCH, 1, b + (size_t)k0 * b_step, b_step, pitch, c, sums, h,
                       (size_t)i * n, n, rows, first, last, bias, steps, flags);
        }
        flags &= ~GEMM_FIRST;
        k0 += steps;
    } while (k0 < k);
}

// Groups: any number; there are across * down blocks.
KERNEL(1, 1)
void gemm_rows_cpu(volatile GLOBAL int *turns, const GLOBAL float *a, const GLOBAL float *b,
                   GLOBAL float *c, GLOBAL float *sums, GLOBAL float *h, const GLOBAL float *bias,
                   const GLOBAL int *offsets, int groups, int down, int across, int m, int n, int k,
                   int skip, int block, int wide, int depth, int flags)
{
    GEMM_STRIP(strip);
    for (int i = gemm_next_block(turns); i < down * across; i = gemm_next_block(turns))
        gemm_rows_block(strip, a, b, c, sums, h, bias, offsets, groups, i % down, i / down, m, n, k,
                        skip, block, wide, depth, flags);
    gemm_no_more_blocks(turns);
}

// C[group] = A^T B: A stored [k,m], summed over the group's rows of A and B; the rest as
// gemm_rows_block. Blocks: x, rows: m / block; y, panels / wide.
inline void gemm_columns_block(float *strip, const GLOBAL float *a, const GLOBAL float *b,
                               GLOBAL float *c, GLOBAL float *sums, const GLOBAL int *offsets,
                               int group, int x, int y, int m, int n, int k, int skip, int block,
                               int wide, int depth, int flags)
{
    int panels = (n + GEMM_NR - 1) / GEMM_NR;
    int row0 = x * block, end = min(row0 + block, m);
    int k0 = offsets ? offsets[group] : 0, k_end = offsets ? offsets[group + 1] : k;
    int first = y * wide, last = min(first + wide, panels);
    int b_step = flags & GEMM_B_IN_PLACE ? n : (int)GEMM_NR;
    size_t at = (size_t)group * m * n,
           pitch = flags & GEMM_B_IN_PLACE ? (size_t)GEMM_NR : gemm_panel_pitch(k);
    sums += (size_t)skip * 16;
    flags |= GEMM_FIRST;
    do {
        int steps = min(depth, k_end - k0);
        if (k0 + steps == k_end)
            flags |= GEMM_LAST;
        for (int i = row0; i < end; i += GEMM_MR) {
            int rows = min((int)GEMM_MR, end - i);
            gemm_take_columns(strip, a, (size_t)k0 * m + i, m, rows, steps, flags & GEMM_A_BF16);
            gemm_strip(strip, 1, GEMM_MR, b + (size_t)k0 * b_step, b_step, pitch, c, sums, 0,
                       at + (size_t)i * n, n, rows, first, last, 0, steps, flags);
        }
        flags &= ~GEMM_FIRST;
        k0 += steps;
    } while (k0 < k_end);
}

// Groups: any number; there are down * across * groups blocks.
KERNEL(1, 1)
void gemm_columns_cpu(volatile GLOBAL int *turns, const GLOBAL float *a, const GLOBAL float *b,
                      GLOBAL float *c, GLOBAL float *sums, const GLOBAL int *offsets, int groups,
                      int down, int across, int m, int n, int k, int skip, int block, int wide,
                      int depth, int flags)
{
    GEMM_STRIP(strip);
    int all = down * across * groups;
    for (int i = gemm_next_block(turns); i < all; i = gemm_next_block(turns))
        gemm_columns_block(strip, a, b, c, sums, offsets, i / (down * across), i % down,
                           i / down % across, m, n, k, skip, block, wide, depth, flags);
    gemm_no_more_blocks(turns);
}

// ---- matrix products: packing for the CPU form

// The elements of a and b in turn, from their first (second) halves.
#if VECTOR_WIDTH >= 16
inline vec gemm_zip(float8 a, float8 b)
{
    return (vec)(a.s0, b.s0, a.s1, b.s1, a.s2, b.s2, a.s3, b.s3, a.s4, b.s4, a.s5, b.s5, a.s6, b.s6,
                 a.s7, b.s7);
}
#else
inline vec gemm_zip(float4 a, float4 b)
{
    return (vec)(a.s0, b.s0, a.s1, b.s1, a.s2, b.s2, a.s3, b.s3);
}
#endif

// to[k][GEMM_NR] = from[i][k] transposed, a square of GEMM_VW. Each round of zipping rotates the bits
// of (row, column) by one place; after log2(GEMM_VW) rounds rows and columns have changed places.
inline void gemm_transpose(GLOBAL float *to, const GLOBAL void *from, size_t at, size_t ld, int bf16)
{
    vec v[GEMM_VW], t[GEMM_VW];
#pragma unroll
    for (int i = 0; i < GEMM_VW; i++)
        v[i] = gemm_load_vec(from, at + i * ld, bf16);
#pragma unroll
    for (int round = 1; round < GEMM_VW; round *= 2) {
#pragma unroll
        for (int i = 0; i < GEMM_VW / 2; i++) {
            t[2 * i] = gemm_zip(v[i].lo, v[i + GEMM_VW / 2].lo);
            t[2 * i + 1] = gemm_zip(v[i].hi, v[i + GEMM_VW / 2].hi);
        }
#pragma unroll
        for (int i = 0; i < GEMM_VW; i++)
            v[i] = t[i];
    }
#pragma unroll
    for (int i = 0; i < GEMM_VW; i++)
        VSTORE(v[i], to + i * GEMM_NR);
}

// Element by element: rows [k0, k_end) of half a panel from column `col`, zeros past column n.
inline void gemm_pack_slow(GLOBAL float *to, const GLOBAL void *b, size_t at, size_t column,
                           size_t step, int col, int n, int k0, int k_end, int bf16)
{
    for (int k = k0; k < k_end; k++)
        for (int j = 0; j < GEMM_VW; j++)
            to[(size_t)k * GEMM_NR + j] =
                col + j < n ? gemm_load(b, at + (col + j) * column + k * step, bf16) : 0.0f;
}

// Packs B, [groups] of [n,k] (along_k) or [k,n], into panels [groups][panel][k][GEMM_NR] f32,
// padded with zeros to whole panels. With GEMM_SWIGLU_FORWARD (along_k) the halves of a panel come
// from the halves of the columns.
// Groups: (k / depth, panels / wide, number of groups); depth a multiple of GEMM_VW.
KERNEL(1, 1)
void gemm_pack_cpu(GLOBAL float *to, const GLOBAL float *b, int along_k, int n, int k,
                   int depth, int wide, int flags)
{
    int bf16 = flags & GEMM_B_BF16, panels = (n + GEMM_NR - 1) / GEMM_NR;
    int k0 = (int)get_group_id(0) * depth, k_end = min(k0 + depth, k);
    int first = (int)get_group_id(1) * wide, last = min(first + wide, panels);
    size_t group = get_group_id(2), at = group * n * k, column = along_k ? k : 1,
           step = along_k ? 1 : n;
    size_t pitch = gemm_panel_pitch(k);
    to += group * panels * pitch;
    int whole = min(last, n / GEMM_NR), k_whole = k_end - (k_end - k0) % GEMM_VW;
    if (!along_k)
        for (int s = k0; s < k_end; s++)
            for (int p = first; p < whole; p++)
                for (int j = 0; j < GEMM_NR; j += GEMM_VW)
                    VSTORE(gemm_load_vec(b, at + (size_t)s * n + p * GEMM_NR + j, bf16),
                           to + p * pitch + (size_t)s * GEMM_NR + j);
    for (int p = first; p < last; p++)
        for (int side = 0; side < 2; side++) {
            GLOBAL float *panel = to + p * pitch + side * GEMM_VW;
            int slow = p < whole ? k_end : k0;
            int col = flags & GEMM_SWIGLU_FORWARD ? p * GEMM_VW + side * (n / 2)
                                                  : p * GEMM_NR + side * GEMM_VW;
            if (p < whole && along_k) {
                for (int s = k0; s < k_whole; s += GEMM_VW)
                    gemm_transpose(panel + (size_t)s * GEMM_NR, b, at + (size_t)col * k + s, k, bf16);
                slow = k_whole;
            }
            gemm_pack_slow(panel, b, at, column, step, col, n, slow, k_end, bf16);
        }
}

#endif // CPU_FORMS
