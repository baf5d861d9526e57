// One layer's decode attention over ragged lengths, as sun/decode/kernels.py does it: what that kernel is measured against.
// Compiled on the spot by sun_perf.attention; nothing that serves uses it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int SIZE = HEAD_DIM, BLOCK = 32;  // tokens whose scores are taken at once, so that K, V and scores stay in the first cache

static void rotate(float *value, const float *cosine, const float *sine) {
    for (int j = 0; j < SIZE / 2; j++) {
        float low = value[j], high = value[SIZE / 2 + j];
        value[j] = low * cosine[j] - high * sine[j];
        value[SIZE / 2 + j] = high * cosine[SIZE / 2 + j] + low * sine[SIZE / 2 + j];
    }
}

// Softmax attention of GROUP query heads that share keys and values [n, SIZE], in one reading of both (online softmax).
static void attend(const float *__restrict q, const float *__restrict keys, const float *__restrict values, int64_t n, float *__restrict out) {
    float top[GROUP], total[GROUP], sum[GROUP][SIZE], scores[GROUP][BLOCK];
    std::fill(top, top + GROUP, -INFINITY);
    std::fill(total, total + GROUP, 0.0f);
    std::memset(sum, 0, sizeof sum);
    for (int64_t start = 0; start < n; start += BLOCK) {
        int size = std::min<int64_t>(BLOCK, n - start);
        for (int t = 0; t < size; t++) {
            const float *key = keys + (start + t) * SIZE;
            for (int g = 0; g < GROUP; g++) {
                float dot = 0;
                for (int j = 0; j < SIZE; j++) dot += q[g * SIZE + j] * key[j];
                scores[g][t] = dot;
            }
        }
        for (int g = 0; g < GROUP; g++) {
            float high = top[g];
            for (int t = 0; t < size; t++) high = std::max(high, scores[g][t]);
            float keep = std::exp(top[g] - high), added = 0;
            for (int t = 0; t < size; t++) {
                scores[g][t] = std::exp(scores[g][t] - high);
                added += scores[g][t];
            }
            total[g] = total[g] * keep + added;
            top[g] = high;
            for (int j = 0; j < SIZE; j++) sum[g][j] *= keep;
        }
        for (int g = 0; g < GROUP; g++)
            for (int t = 0; t < size; t++)
                for (int j = 0; j < SIZE; j++) sum[g][j] += scores[g][t] * values[(start + t) * SIZE + j];
    }
    for (int g = 0; g < GROUP; g++)
        for (int j = 0; j < SIZE; j++) out[g * SIZE + j] = sum[g][j] / total[g];
}

// y [batch, (heads + 2 kv_heads) * SIZE], kv [2, kv_heads, budget, SIZE], cosine and sine [batch, SIZE], out [batch, heads * SIZE].
extern "C" void attention(int64_t batch, int64_t kv_heads, int64_t budget, const float *y, const float *cosine, const float *sine,
                          const int64_t *starts, const int64_t *positions, float *kv, float *out) {
    const int64_t heads = kv_heads * GROUP, width = (heads + 2 * kv_heads) * SIZE;
    const float root = 1 / std::sqrt((float)SIZE);
    std::vector<float> value(width);
    for (int64_t row = 0; row < batch; row++) {
        std::copy(y + row * width, y + (row + 1) * width, value.begin());
        for (int64_t h = 0; h < heads + kv_heads; h++) rotate(&value[h * SIZE], cosine + row * SIZE, sine + row * SIZE);
        for (int64_t j = 0; j < heads * SIZE; j++) value[j] *= root;
        for (int64_t h = 0; h < kv_heads; h++) {
            float *keys = kv + (h * budget + starts[row]) * SIZE, *values = keys + kv_heads * budget * SIZE;
            std::copy_n(&value[(heads + h) * SIZE], SIZE, keys + positions[row] * SIZE);
            std::copy_n(&value[(heads + kv_heads + h) * SIZE], SIZE, values + positions[row] * SIZE);
            attend(&value[h * GROUP * SIZE], keys, values, positions[row] + 1, out + (row * heads + h * GROUP) * SIZE);
        }
    }
}
