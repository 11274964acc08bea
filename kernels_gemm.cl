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
// registers (12 x 2 of the 32 AVX-512 registers; 6 x 2 of the 16 AVX2 ones) while k runs to the
// end, and A is read where it lies, one broadcast element at a time.
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

inline vec gemm_load_vec(const GLOBAL void *p, size_t i, int bf16)
{
    return bf16 ? gemm_bf16_vec((const GLOBAL ushort *)p + i) : VLOAD((const GLOBAL float *)p + i);
}

// Writes `rows` rows of `cols` columns of a finished tile (private memory, GEMM_NR a row) to C.
inline void gemm_write_tile(const float *tile, GLOBAL void *c, size_t at, size_t ldc, int rows,
                            int cols, const GLOBAL float *bias, int flags)
{
    for (int i = 0; i < rows; i++, at += ldc, tile += GEMM_NR) {
        if (cols < GEMM_NR) {
            for (int j = 0; j < cols; j++)
                gemm_store(c, at + j, tile[j] + (bias ? bias[j] : 0.0f), flags);
            continue;
        }
        for (int j = 0; j < GEMM_NR; j += GEMM_VW) {
            vec v = VLOAD(tile + j);
            if (bias)
                v += VLOAD(bias + j);
            if (flags & GEMM_ACCUMULATE)
                v += gemm_load_vec(c, at + j, flags & GEMM_C_BF16);
            if (flags & GEMM_C_BF16)
                gemm_vec_bf16(v, (GLOBAL ushort *)c + at + j);
            else
                VSTORE(v, (GLOBAL float *)c + at + j);
        }
    }
}

// tile[GEMM_MR][GEMM_NR] = sum over k of a[i*row + k*step] * b[k][GEMM_NR]
inline void gemm_multiply(float *tile, const GLOBAL float *restrict a, size_t row, size_t step,
                          const GLOBAL float *restrict b, int k)
{
    vec acc[GEMM_MR][2];
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++)
        acc[i][0] = acc[i][1] = 0.0f;
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < GEMM_MR; i++) {
            vec v = a[i * row];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        b += GEMM_NR;
    }
#pragma unroll
    for (int i = 0; i < GEMM_MR; i++) {
        VSTORE(acc[i][0], tile + i * GEMM_NR);
        VSTORE(acc[i][1], tile + i * GEMM_NR + GEMM_VW);
    }
}

// The same for 1..4 rows: missing rows read the last one and are not used.
inline void gemm_multiply_tail(float *tile, const GLOBAL float *restrict a, size_t row, size_t step,
                               const GLOBAL float *restrict b, int k, int rows)
{
    vec acc[4][2];
    size_t at[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        acc[i][0] = acc[i][1] = 0.0f;
        at[i] = (i < rows ? i : rows - 1) * row;
    }
    for (int s = 0; s < k; s++) {
        vec b0 = VLOAD(b), b1 = VLOAD(b + GEMM_VW);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            vec v = a[at[i]];
            acc[i][0] = fma(v, b0, acc[i][0]);
            acc[i][1] = fma(v, b1, acc[i][1]);
        }
        a += step;
        b += GEMM_NR;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        VSTORE(acc[i][0], tile + i * GEMM_NR);
        VSTORE(acc[i][1], tile + i * GEMM_NR + GEMM_VW);
    }
}

// `rows` rows times one panel, `cols` of whose columns exist; `at`: the first element in C.
inline void gemm_panel(const GLOBAL float *a, size_t row, size_t step, size_t strip,
                       const GLOBAL float *b,
                       GLOBAL void *c, size_t at, size_t ldc, int rows, int cols,
                       const GLOBAL float *bias, int k, int flags)
{
    float tile[GEMM_MR * GEMM_NR];
    int i = 0;
    for (; i + GEMM_MR <= rows; i += GEMM_MR, a += strip) {
        gemm_multiply(tile, a, row, step, b, k);
        gemm_write_tile(tile, c, at + i * ldc, ldc, GEMM_MR, cols, bias, flags);
    }
    for (; i < rows; i += 4, a += 4 * row) {
        int some = min(4, rows - i);
        gemm_multiply_tail(tile, a, row, step, b, k, some);
        gemm_write_tile(tile, c, at + i * ldc, ldc, some, cols, bias, flags);
    }
}

// C = A B over blocks of `block` rows and `wide` panels: A [m,k] f32, B packed, [groups] of them, from
// element 16*skip; ragged over rows where there are offsets.
// Groups: (row blocks: m / block + number of groups, panels / wide).
KERNEL(1, 1)
void gemm_rows_cpu(const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c,
                   const GLOBAL float *bias, const GLOBAL int *offsets, int groups, int m, int n,
                   int k, int lda, int skip, int block, int wide, int flags)
{
    int group, end, panels = (n + GEMM_NR - 1) / GEMM_NR;
    int row0 = gemm_block(offsets, groups, (int)get_group_id(0), block, m, &group, &end);
    int first = (int)get_group_id(1) * wide, last = min(first + wide, panels);
    if (row0 >= end)
        return;
    a += (size_t)row0 * lda;
    b += (size_t)skip * 16 + (size_t)group * panels * k * GEMM_NR;
    for (int p = first; p < last; p++) {
        int col = p * GEMM_NR;
        gemm_panel(a, lda, 1, (size_t)GEMM_MR * lda, b + (size_t)p * k * GEMM_NR, c,
                   (size_t)row0 * n + col, n, end - row0, n - col, bias ? bias + col : bias, k, flags);
    }
}

// C[group] = A^T B: A in strips, B in panels from element 16*skip; the group's rows are cut into
// steps of `depth`, whose panels stay in the cache while all rows of the block of C pass.
// Groups: (m / block, panels / wide, number of groups); block a multiple of GEMM_MR.
KERNEL(1, 1)
void gemm_columns_cpu(const GLOBAL float *a, const GLOBAL float *b, GLOBAL float *c,
                      const GLOBAL int *offsets, int m, int n, int k, int skip, int block, int wide,
                      int depth, int flags)
{
    int group = (int)get_group_id(2), panels = (n + GEMM_NR - 1) / GEMM_NR;
    int row0 = (int)get_group_id(0) * block, rows = min(block, m - row0);
    int k0 = offsets ? offsets[group] : 0, k_end = offsets ? offsets[group + 1] : k;
    int first = (int)get_group_id(1) * wide, last = min(first + wide, panels);
    size_t at = ((size_t)group * m + row0) * n;
    b += (size_t)skip * 16;
    do {
        int steps = min(depth, k_end - k0);
        const GLOBAL float *ak = a + (size_t)row0 * k + (size_t)k0 * GEMM_MR;
        for (int p = first; p < last; p++)
            gemm_panel(ak, 1, GEMM_MR, (size_t)k * GEMM_MR, b + ((size_t)p * k + k0) * GEMM_NR, c,
                       at + p * GEMM_NR, n, rows, n - p * GEMM_NR, 0, steps, flags);
        flags |= GEMM_ACCUMULATE;
        k0 += steps;
    } while (k0 < k_end);
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

// Element by element: rows [k0, k_end) of a panel from column `col`, zeros past column n.
inline void gemm_pack_slow(GLOBAL float *to, const GLOBAL void *b, size_t at, size_t column,
                           size_t step, int col, int n, int k0, int k_end, int bf16)
{
    for (int k = k0; k < k_end; k++)
        for (int j = 0; j < GEMM_NR; j++)
            to[(size_t)k * GEMM_NR + j] =
                col + j < n ? gemm_load(b, at + (col + j) * column + k * step, bf16) : 0.0f;
}

// Packs B, [groups] of [n,k] (along_k) or [k,n], into panels [groups][panel][k][GEMM_NR] f32 from
// element 16*skip on, padded with zeros to whole panels.
// Groups: (k / depth, panels / wide, number of groups); depth a multiple of GEMM_VW.
KERNEL(1, 1)
void gemm_pack_cpu(GLOBAL float *to, const GLOBAL float *b, int along_k, int n, int k, int skip,
                   int depth, int wide, int flags)
{
    int bf16 = flags & GEMM_B_BF16, panels = (n + GEMM_NR - 1) / GEMM_NR;
    int k0 = (int)get_group_id(0) * depth, k_end = min(k0 + depth, k);
    int first = (int)get_group_id(1) * wide, last = min(first + wide, panels);
    size_t group = get_group_id(2), at = group * n * k, column = along_k ? k : 1,
           step = along_k ? 1 : n;
    to += (size_t)skip * 16 + group * panels * k * GEMM_NR;
    int whole = min(last, n / GEMM_NR), k_whole = k_end - (k_end - k0) % GEMM_VW;
    if (!along_k)
        for (int s = k0; s < k_end; s++)
            for (int p = first; p < whole; p++)
                for (int j = 0; j < GEMM_NR; j += GEMM_VW)
                    VSTORE(gemm_load_vec(b, at + (size_t)s * n + p * GEMM_NR + j, bf16),
                           to + ((size_t)p * k + s) * GEMM_NR + j);
    for (int p = first; p < last; p++) {
        GLOBAL float *panel = to + (size_t)p * k * GEMM_NR;
        int slow = p < whole ? k_end : k0;
        if (p < whole && along_k) {
            for (int s = k0; s < k_whole; s += GEMM_VW)
                for (int j = 0; j < GEMM_NR; j += GEMM_VW)
                    gemm_transpose(panel + (size_t)s * GEMM_NR + j, b,
                                   at + (size_t)(p * GEMM_NR + j) * k + s, k, bf16);
            slow = k_whole;
        }
        gemm_pack_slow(panel, b, at, column, step, p * GEMM_NR, n, slow, k_end, bf16);
    }
}

// Packs A, stored [k,m], into strips [strip][k][GEMM_MR] f32, padded with zeros. Groups: (k / depth).
KERNEL(1, 1)
void gemm_strips_cpu(GLOBAL float *to, const GLOBAL float *a, int m, int k, int depth, int flags)
{
    int k0 = (int)get_group_id(0) * depth, k_end = min(k0 + depth, k);
    int whole = m / GEMM_MR, bf16 = flags & GEMM_A_BF16;
    for (int s = k0; s < k_end; s++) {
        size_t at = (size_t)s * m;
        GLOBAL float *out = to + (size_t)s * GEMM_MR;
        for (int i = 0; i < whole; i++, at += GEMM_MR, out += (size_t)k * GEMM_MR) {
            if (bf16) {
                for (int j = 0; j < GEMM_MR; j++)
                    out[j] = gemm_load(a, at + j, bf16);
            } else {
#if VECTOR_WIDTH >= 16
                vstore8(vload8(0, a + at), 0, out);
                vstore4(vload4(0, a + at + 8), 0, out + 8);
#else
                vstore4(vload4(0, a + at), 0, out);
                vstore2(vload2(0, a + at + 4), 0, out + 4);
#endif
            }
        }
        for (int j = whole * GEMM_MR; j < (whole + 1) * GEMM_MR && m % GEMM_MR; j++)
            *out++ = j < m ? gemm_load(a, at++, bf16) : 0.0f;
    }
}

// to[rows][ld] f32 = from[rows][cols]: A as the kernels above want it. Groups: (rows / some).
KERNEL(1, 1)
void gemm_convert_cpu(GLOBAL float *to, const GLOBAL float *from, int rows, int cols, int ld,
                      int some, int flags)
{
    int first = (int)get_group_id(0) * some, last = min(first + some, rows);
    for (int i = first; i < last; i++) {
        size_t in = (size_t)i * cols, out = (size_t)i * ld;
        int j = 0;
        for (; j + GEMM_VW <= cols; j += GEMM_VW)
            VSTORE(gemm_load_vec(from, in + j, flags & GEMM_A_BF16), to + out + j);
        for (; j < cols; j++)
            to[out + j] = gemm_load(from, in + j, flags & GEMM_A_BF16);
    }
}
#endif // CPU_FORMS
