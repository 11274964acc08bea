// Images: PNG and JPEG in, resampling against Pillow, PNG and figures out.
#include "tests/test.h"

#include <math.h>
#include <png.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <zlib.h>

#include <jpeglib.h>

#include "model/figure.h"
#include "model/image.h"

// ---- helpers ------------------------------------------------------------------------------------

static const char *in_directory(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", test_directory(), name);
    return path;
}

static size_t get(const char *path, uint8_t *data, size_t room)
{
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(data, 1, room, f) : 0;
    if (f)
        fclose(f);
    return n;
}

static void put(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f))
        abort();
}

static bool says(const char *path, const char *what)
{
    const char *m = error_message();
    return strstr(m, path) == m && strstr(m, what) && !strchr(m, '\n');
}

// ---- resampling ---------------------------------------------------------------------------------

static void pattern(int width, int height, int channels, struct image *out)
{
    if (image_new(width, height, channels, out) < 0)
        abort();
    uint8_t *p = out->pixels;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++)
            for (int k = 0; k < channels; k++)
                *p++ =
                    (uint8_t)(x * 7 + y * 13 + k * 31 +
                              (x * y * (k + 1) + width + height) % 97 * 3 + x / 5 * (y / 3) * 11);
}

// Made with Pillow 13: ADM's crop of pattern(); all bytes as FNV-1a, the first and the last four.
static const struct {
    int width, height, channels, size;
    uint64_t hash;
    uint8_t ends[8];
} crops[] = {
    {64, 64, 3, 32, 0x955e483559f6930cu, {104, 136, 168, 121, 114, 96, 133, 89}},
    {65, 63, 3, 32, 0x7a5f3548037e27bdu, {104, 136, 170, 121, 171, 126, 135, 190}},
    {200, 131, 3, 32, 0xf22bec887b0a5a3fu, {94, 114, 136, 110, 50, 113, 114, 123}},
    {131, 200, 1, 32, 0x27658afb63609e90u, {130, 127, 141, 138, 132, 115, 131, 131}},
    {37, 101, 3, 64, 0xb0492b2670a87016u, {13, 39, 83, 51, 96, 214, 41, 109}},
    {28, 28, 1, 32, 0xdf3bcd0beab7d67bu, {168, 174, 179, 185, 196, 183, 219, 28}},
    {333, 77, 3, 16, 0x784d52e041d20ad3u, {136, 145, 63, 148, 140, 129, 133, 117}},
    {63, 127, 1, 31, 0xd13f93a0d2341602u, {161, 160, 72, 120, 112, 105, 141, 176}},
    {129, 129, 3, 64, 0xef191d48eb36d0a9u, {203, 235, 75, 220, 227, 102, 95, 208}},
    {64, 48, 3, 48, 0x980910aa9bfae28fu, {101, 132, 163, 108, 74, 229, 158, 87}},
    {45, 30, 3, 20, 0xf8da6fc5b5cf6c2bu, {33, 72, 103, 46, 107, 122, 140, 124}},
    {31, 31, 3, 16, 0x2e838ce9a4d2831du, {199, 222, 122, 224, 88, 124, 103, 106}},
};

static int test_center_crop(void)
{
    for (size_t i = 0; i < sizeof crops / sizeof *crops; i++) {
        struct image in, out;
        int size = crops[i].size;
        pattern(crops[i].width, crops[i].height, crops[i].channels, &in);
        OK(image_center_crop(&in, size, &out));
        CHECK(out.width == size && out.height == size && out.channels == in.channels, "row %zu", i);
        size_t bytes = (size_t)(size * size * out.channels);
        uint64_t hash = 0xcbf29ce484222325u;
        for (size_t k = 0; k < bytes; k++)
            hash = (hash ^ out.pixels[k]) * 0x100000001b3u;
        CHECK(!memcmp(out.pixels, crops[i].ends, 4) &&
                  !memcmp(out.pixels + bytes - 4, crops[i].ends + 4, 4),
              "row %zu: ends differ", i);
        CHECK(hash == crops[i].hash, "row %zu: differs inside", i);
        image_free(&in);
        image_free(&out);
    }
    return PASSED;
}

static int test_floats(void)
{
    struct image in, out;
    float values[3 * 20];
    pattern(5, 4, 3, &in);
    image_to_floats(&in, values);
    CHECK(values[20] == (float)in.pixels[1] / 127.5f - 1.0f, "planes");
    OK(image_from_floats(values, 5, 4, 3, &out));
    CHECK(!memcmp(in.pixels, out.pixels, 60), "there and back");
    image_free(&in);
    image_free(&out);
    OK(image_from_floats((float[]){-7, 9, 0, -1}, 2, 2, 1, &out));
    CHECK(!memcmp(out.pixels, (uint8_t[]){0, 255, 128, 0}, 4), "clamping");
    image_free(&out);
    CHECK(image_new(70000, 2, 1, &out) == ERR_INPUT &&
              image_new(60000, 60000, 3, &out) == ERR_INPUT &&
              image_new(0, 5, 1, &out) == ERR_INPUT,
          "limits");
    return PASSED;
}

// ---- PNG ----------------------------------------------------------------------------------------

// Writes an 8 x 5 PNG of any kind: sample k of pixel (x, y) is v(x,y,k) = 20x + 37y + 60k modulo
// 2^depth, 16-bit samples have v in both bytes.
static void write_png(const char *path, int type, int depth, int interlace)
{
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    FILE *f = fopen(path, "wb");
    png_init_io(png, f);
    png_set_IHDR(png, info, 8, 5, depth, type, interlace, 0, 0);
    png_color palette[256];
    for (int i = 0; i < 256; i++)
        palette[i] = (png_color){(png_byte)i, (png_byte)(255 - i), (png_byte)(i * 3)};
    if (type == PNG_COLOR_TYPE_PALETTE) {
        png_set_PLTE(png, info, palette, 1 << depth);
        png_set_tRNS(png, info, (png_byte[]){0, 128}, 2, NULL);
    }
    png_write_info(png, info);
    static uint8_t rows[5][8 * 4 * 2];
    png_bytep pointers[5];
    int channels = png_get_channels(png, info);
    memset(rows, 0, sizeof rows);
    for (int y = 0; y < 5; y++) {
        pointers[y] = rows[y];
        for (int i = 0; i < 8 * channels; i++) {
            int v = (20 * (i / channels) + 37 * y + 60 * (i % channels)) &
                    ((1 << (depth < 8 ? depth : 8)) - 1);
            if (depth == 16)
                rows[y][2 * i] = rows[y][2 * i + 1] = (uint8_t)v;
            else
                rows[y][i * depth / 8] |= (uint8_t)(v << (8 - depth - i * depth % 8));
        }
    }
    png_write_image(png, pointers);
    png_write_end(png, info);
    png_destroy_write_struct(&png, &info);
    fclose(f);
}

// What sample c of the image read back should be.
static int png_expected(int type, int depth, int x, int y, int c)
{
    int most = (1 << (depth < 8 ? depth : 8)) - 1, v = 20 * x + 37 * y;
    if (type == PNG_COLOR_TYPE_PALETTE) {
        v &= most;
        return c == 0 ? v : c == 1 ? 255 - v : v * 3 & 255;
    }
    return ((v + 60 * c) & most) * 255 / most;
}

static int test_png_kinds(void)
{
    static const int kinds[][2] = {{0, 1}, {0, 2}, {0, 4}, {0, 8}, {0, 16}, {2, 8}, {2, 16}, {3, 1},
                                   {3, 2}, {3, 4}, {3, 8}, {4, 8}, {4, 16}, {6, 8}, {6, 16}};
    const char *path = in_directory("kind.png");
    for (size_t i = 0; i < 2 * sizeof kinds / sizeof *kinds; i++) {
        int type = kinds[i / 2][0], depth = kinds[i / 2][1];
        struct image image;
        write_png(path, type, depth, (int)(i & 1));
        OK(image_read(path, 0, &image));
        CHECK(image.channels == (type & 2 ? 3 : 1) && image.width == 8 && image.height == 5,
              "type %d depth %d", type, depth);
        for (int k = 0; k < 40 * image.channels; k++) {
            int pixel = k / image.channels, c = k % image.channels;
            int expected = png_expected(type, depth, pixel % 8, pixel / 8, c);
            CHECK(image.pixels[k] == expected, "type %d depth %d sample %d: %d, expected %d", type,
                  depth, k, image.pixels[k], expected);
        }
        image_free(&image);
        OK(image_read(path, type & 2 ? 1 : 3, &image));
        CHECK(image.channels == (type & 2 ? 1 : 3), "not converted");
        image_free(&image);
    }
    return PASSED;
}

static int test_png_round_trip(void)
{
    const char *path = in_directory("round.png");
    const struct image_text texts[] = {
        {"parameters", "steps 50\ncfg 2.0"}, {"class", "caf\xc3\xa9"}, {"empty", ""}};
    for (int channels = 1; channels <= 3; channels += 2) {
        struct image in, out;
        char *value;
        pattern(33, 17, channels, &in);
        OK(image_write_png(path, &in, texts, 3));
        OK(image_read(path, 0, &out));
        CHECK(out.channels == channels &&
                  !memcmp(in.pixels, out.pixels, 33u * 17u * (size_t)channels),
              "pixels");
        for (int i = 0; i < 3; i++) {
            OK(image_read_text(path, texts[i].key, &value));
            CHECK(value && !strcmp(value, texts[i].value), "text %s", texts[i].key);
            free(value);
        }
        OK(image_read_text(path, "none", &value));
        CHECK(!value, "a text that is not there");
        image_free(&in);
        image_free(&out);
    }
    return PASSED;
}

static int test_bad_png(void)
{
    static uint8_t data[4096];
    const char *path = in_directory("bad.png");
    struct image image;
    pattern(20, 10, 3, &image);
    OK(image_write_png(path, &image, NULL, 0));
    image_free(&image);
    size_t bytes = get(path, data, sizeof data);
    CHECK(bytes > 100 && bytes < sizeof data, "%zu", bytes);
    for (size_t n = 0; n < bytes; n++) {
        put(path, data, n);
        CHECK(image_read(path, 0, &image) == ERR_INPUT && !image.pixels, "opens when cut at %zu",
              n);
        CHECK(says(path, ""), "cut at %zu: %s", n, error_message());
    }
    for (size_t i = 8; i < bytes; i++) { // every byte changed: an error or an image, no crash
        data[i] ^= 0x24;
        put(path, data, bytes);
        if (image_read(path, 0, &image) < 0)
            CHECK(says(path, ""), "byte %zu: %s", i, error_message());
        image_free(&image);
        data[i] ^= 0x24;
    }
    static const uint32_t sizes[][2] = {
        {0x7fffffff, 0x7fffffff}, {65000, 65000}, {1, 0x7fffffff}, {0, 5}};
    for (int k = 0; k < 4; k++) { // a header that promises far more than there is
        for (int i = 0; i < 8; i++)
            data[16 + i] = (uint8_t)(sizes[k][i / 4] >> (24 - 8 * (i % 4)));
        uint32_t crc = (uint32_t)crc32(0, data + 12, 17);
        for (int i = 0; i < 4; i++)
            data[29 + i] = (uint8_t)(crc >> (24 - 8 * i));
        put(path, data, bytes);
        CHECK(image_read(path, 0, &image) == ERR_INPUT && says(path, ""), "%d: %s", k,
              error_message());
    }
    put(path, "This is a text file, whatever its name says.\n", 45);
    CHECK(image_read(path, 0, &image) == ERR_INPUT && says(path, "neither a PNG nor a JPEG"), "%s",
          error_message());
    CHECK(image_read(in_directory("absent.png"), 0, &image) == ERR_IO &&
              says(in_directory("absent.png"), "opened"),
          "%s", error_message());
    CHECK(image_read(test_directory(), 0, &image) == ERR_IO && says(test_directory(), "regular"),
          "%s", error_message());
    return PASSED;
}

static int test_png_full_disk(void)
{
    const char *path = in_directory("disk.png");
    struct image first, second, now;
    pattern(20, 10, 3, &first);
    pattern(64, 64, 3, &second);
    OK(image_write_png(path, &first, NULL, 0));
    void (*before)(int) = signal(SIGXFSZ, SIG_IGN);
    struct rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    int failed = 0, limits = 0;
    for (rlim_t n = 0; n < 2000; n += 97, limits++) {
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){n, old.rlim_max});
        failed += image_write_png(path, &second, NULL, 0) == ERR_IO && says(path, "too large");
    }
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, before);
    CHECK(failed == limits, "%d of %d: %s", failed, limits, error_message());
    OK(image_read(path, 0, &now));
    CHECK(now.width == 20, "the previous image was lost");
    image_free(&first);
    image_free(&second);
    image_free(&now);
    CHECK(image_new(2, 2, 1, &first) == 0 &&
              image_write_png(in_directory("no/such/dir.png"), &first, NULL, 0) == ERR_IO,
          "no directory");
    image_free(&first);
    return PASSED;
}

// ---- JPEG ---------------------------------------------------------------------------------------

// A smooth image of 40 x 24 in `space`: sample k rises with x (even k) or y (odd k).
static int smooth(int x, int y, int k)
{
    return k % 2 ? y * 10 : x * 6;
}

static size_t write_jpeg(const char *path, J_COLOR_SPACE space, int channels, bool progressive,
                         uint8_t *data, size_t room)
{
    struct jpeg_compress_struct j;
    struct jpeg_error_mgr errors;
    j.err = jpeg_std_error(&errors);
    jpeg_create_compress(&j);
    FILE *f = fopen(path, "wb");
    jpeg_stdio_dest(&j, f);
    j.image_width = 40;
    j.image_height = 24;
    j.input_components = channels;
    j.in_color_space = space;
    jpeg_set_defaults(&j);
    jpeg_set_quality(&j, 98, TRUE);
    if (progressive)
        jpeg_simple_progression(&j);
    jpeg_start_compress(&j, TRUE);
    uint8_t row[40 * 4];
    for (int y = 0; y < 24; y++) {
        for (int i = 0; i < 40 * channels; i++)
            row[i] = (uint8_t)smooth(i / channels, y, i % channels);
        JSAMPROW rows[1] = {row};
        jpeg_write_scanlines(&j, rows, 1);
    }
    jpeg_finish_compress(&j);
    jpeg_destroy_compress(&j);
    fclose(f);
    return get(path, data, room);
}

static int test_jpeg(void)
{
    static const struct {
        J_COLOR_SPACE space;
        int channels;
    } rows[] = {{JCS_RGB, 3}, {JCS_GRAYSCALE, 1}, {JCS_CMYK, 4}};
    static uint8_t data[8192];
    const char *path = in_directory("photo.png"); // content decides
    for (int i = 0; i < 6; i++) {
        struct image image;
        write_jpeg(path, rows[i / 2].space, rows[i / 2].channels, i % 2, data, sizeof data);
        OK(image_read(path, 0, &image));
        int c = image.channels;
        CHECK(c == (rows[i / 2].channels == 1 ? 1 : 3) && image.width == 40, "row %d", i);
        for (int k = 0; k < 40 * 24 * c; k++) {
            int x = k / c % 40, y = k / c / 40, expected = smooth(x, y, k % c);
            if (rows[i / 2].channels == 4) // as Adobe: inverted, so ink times black
                expected = expected * smooth(x, y, 3) / 255;
            CHECK(abs(image.pixels[k] - expected) <= 12, "row %d sample %d: %d, expected %d", i, k,
                  image.pixels[k], expected);
        }
        image_free(&image);
    }
    return PASSED;
}

static int test_bad_jpeg(void)
{
    static uint8_t data[8192];
    const char *path = in_directory("bad.jpg");
    struct image image;
    for (int progressive = 0; progressive < 2; progressive++) {
        size_t bytes = write_jpeg(path, JCS_RGB, 3, progressive, data, sizeof data);
        CHECK(bytes > 100 && bytes < sizeof data, "%zu", bytes);
        for (size_t n = 0; n + 2 < bytes; n++) {
            CHECK(image_decode(data, n, path, 0, &image) == ERR_INPUT && !image.pixels,
                  "opens when cut at %zu of %zu", n, bytes);
            CHECK(says(path, ""), "cut at %zu: %s", n, error_message());
        }
        for (size_t i = 3; i < bytes; i++) {
            data[i] ^= 0x42;
            if (image_decode(data, bytes, path, 0, &image) < 0)
                CHECK(says(path, ""), "byte %zu: %s", i, error_message());
            image_free(&image);
            data[i] ^= 0x42;
        }
    }
    size_t bytes = write_jpeg(path, JCS_RGB, 3, false, data, sizeof data), at = 2;
    while (data[at + 1] != 0xc0) // to the frame header
        at += 2 + (size_t)data[at + 2] * 256 + data[at + 3];
    memset(data + at + 5, 0xfe, 4);
    CHECK(image_decode(data, bytes, path, 0, &image) == ERR_INPUT && says(path, "beyond the limit"),
          "%s", error_message());
    const uint8_t sides[4] = {49711 >> 8, 49711 & 255, 2009 >> 8, 2009 & 255}; // just below it
    memcpy(data + at + 5, sides, 4);
    CHECK(image_decode(data, bytes, path, 0, &image) == ERR_INPUT && says(path, "it is cut short"),
          "%s", error_message());
    return PASSED;
}

// ---- figures ------------------------------------------------------------------------------------

static int test_grid(void)
{
    const char *path = in_directory("grid.png");
    const char *const labels[2] = {"Ankle boot", "Bag"};
    const struct image_text text = {"seed", "7"};
    struct image images[6] = {0}, out;
    char *value;
    for (int i = 0; i < 5; i++)
        pattern(16, 16, i % 2 ? 3 : 1, &images[i]); // the sixth place stays empty
    struct figure_grid grid = {images, 2, 3, labels, "Title", 4};
    OK(figure_write_grid(path, &grid, &text, 1));
    OK(image_read(path, 0, &out));
    CHECK(out.width > 3 * 64 + 60 && out.height > 2 * 64 + 20, "%d x %d", out.width, out.height);
    CHECK(out.pixels[0] == 255 && out.pixels[1] == 255, "the ground is white");
    OK(image_read_text(path, "seed", &value));
    CHECK(value && !strcmp(value, "7"), "the text chunk");
    free(value);
    image_free(&out);
    grid.labels = NULL;
    grid.title = NULL;
    OK(figure_write_grid(path, &grid, NULL, 0));
    OK(image_read(path, 1, &out));
    bool found =
        false; // the second pixel of the first image, four times as large, after the margin
    for (int x = 0; x + 8 < out.width && !found; x++)
        found = out.pixels[out.width * 20 + x] != 255;
    CHECK(found && out.width < 3 * 64 + 60, "%d x %d", out.width, out.height);
    image_free(&out);
    grid.rows = 0;
    CHECK(figure_write_grid(path, &grid, NULL, 0) == ERR_INPUT && says(path, "without an image"),
          "%s", error_message());
    for (int i = 0; i < 5; i++)
        image_free(&images[i]);
    return PASSED;
}

static int test_chart(void)
{
    const char *path = in_directory("chart.png");
    double x[500], y[500];
    for (int i = 0; i < 500; i++) {
        x[i] = i;
        y[i] = i == 250 ? INFINITY : 1.0 / (1 + i);
    }
    for (int n = 1; n <= 500; n += 499) {
        for (int k = 0; k < 2; k++) {
            struct figure_curve curve = {NULL, x, y, n, k ? 20 : 0}; // no legend: blue is the curve
            struct figure_chart chart = {"Title", "sub", "step", "loss", &curve, 1, 640, 400};
            struct image out;
            OK(figure_write_chart(path, &chart, NULL, 0));
            OK(image_read(path, 0, &out));
            CHECK(out.width == 640 && out.height == 400 && out.channels == 3, "size");
            int blue = 0;
            for (int i = 0; i < 640 * 400; i++)
                blue += out.pixels[3 * i] < 120 && out.pixels[3 * i + 2] > 140;
            CHECK(blue >= (n == 1 ? 2 : 400), "%d points of the curve's colour", blue);
            image_free(&out);
        }
    }
    for (int i = 0; i < 500; i++)
        y[i] = INFINITY;
    struct figure_curve curve = {"loss", x, y, 500, 5};
    struct figure_chart chart = {"Title", NULL, NULL, NULL, &curve, 1, 0, 0};
    CHECK(figure_write_chart(path, &chart, NULL, 0) == ERR_INPUT && says(path, "without a point"),
          "%s", error_message());
    return PASSED;
}

// ---- the suite ----------------------------------------------------------------------------------

const struct test images_tests[] = {
    {"center_crop", test_center_crop},
    {"floats", test_floats},
    {"png_kinds", test_png_kinds},
    {"png_round_trip", test_png_round_trip},
    {"bad_png", test_bad_png},
    {"png_full_disk", test_png_full_disk},
    {"jpeg", test_jpeg},
    {"bad_jpeg", test_bad_jpeg},
    {"grid", test_grid},
    {"chart", test_chart},
    {0},
};
