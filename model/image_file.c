// Image files: PNG through libpng, JPEG through libjpeg, both from memory; see image.h.
//
// Both libraries report errors by longjmp. Whatever must survive the jump is therefore in a struct
// whose address is known to the library, never in a local variable.
#include "model/image.h"

#include <errno.h>
#include <fcntl.h>
#include <png.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jpeglib.h>
#include <jerror.h>

#include "model/atomic_file.h"

static const size_t FILE_MAX = (size_t)1 << 30; // bytes

// ---- channels -----------------------------------------------------------------------------------

// ITU-R 601-2 luma in 16 fractional bits.
static uint8_t luma(const uint8_t *rgb)
{
    return (uint8_t)((rgb[0] * 19595u + rgb[1] * 38470u + rgb[2] * 7471u + 0x8000u) >> 16);
}

static int set_channels(struct image *image, int channels)
{
    if (channels == 0 || channels == image->channels)
        return 0;
    struct image other;
    TRY(image_new(image->width, image->height, channels, &other));
    size_t count = (size_t)image->width * (size_t)image->height;
    for (size_t i = 0; i < count; i++) {
        if (channels == 1)
            other.pixels[i] = luma(image->pixels + 3 * i);
        else
            memset(other.pixels + 3 * i, image->pixels[i], 3);
    }
    image_free(image);
    *image = other;
    return 0;
}

// ---- PNG, reading -------------------------------------------------------------------------------

struct png_reader {
    png_structp png;
    png_infop info;
    const uint8_t *data;
    size_t left;
    const char *name;
    int code;
    struct image image;
    png_bytep *rows;
    const char *key; // the text chunk wanted, or NULL
    char *value;     // its text, or NULL
};

static void png_failed(png_structp png, png_const_charp what)
{
    struct png_reader *r = png_get_error_ptr(png);
    if (r->code == 0)
        r->code = fail(ERR_INPUT, "%s: damaged PNG image: %s", r->name, what);
    png_longjmp(png, 1);
}

static void png_warned(png_structp png, png_const_charp what)
{
    (void)png, (void)what;
}

static void png_take(png_structp png, png_bytep to, size_t bytes)
{
    struct png_reader *r = png_get_io_ptr(png);
    if (bytes > r->left)
        png_error(png, "it is cut short");
    memcpy(to, r->data, bytes);
    r->data += bytes;
    r->left -= bytes;
}

// Deflate makes at most 1032 bytes of one, so a header alone does not get memory for a large image.
static void png_check_size(struct png_reader *r)
{
    const uint64_t rows = png_get_image_height(r->png, r->info);
    if (png_get_rowbytes(r->png, r->info) * rows > 1032 * (uint64_t)r->left)
        png_error(r->png, "it is cut short");
}

// Whatever the file holds: 8-bit grey or RGB, without transparency.
static int png_prepare(struct png_reader *r)
{
    png_read_info(r->png, r->info);
    png_check_size(r);
    int type = png_get_color_type(r->png, r->info);
    png_set_scale_16(r->png);
    png_set_strip_alpha(r->png);
    if (type == PNG_COLOR_TYPE_PALETTE)
        png_set_palette_to_rgb(r->png);
    if (type == PNG_COLOR_TYPE_GRAY)
        png_set_expand_gray_1_2_4_to_8(r->png);
    png_set_interlace_handling(r->png);
    png_read_update_info(r->png, r->info);
    int channels = type & PNG_COLOR_MASK_COLOR ? 3 : 1;
    if (png_get_channels(r->png, r->info) != channels)
        png_error(r->png, "unexpected number of channels");
    if (image_new((int)png_get_image_width(r->png, r->info),
                  (int)png_get_image_height(r->png, r->info), channels, &r->image) < 0)
        return fail_in(ERR_INPUT, "%s", r->name);
    return 0;
}

static int png_find_text(struct png_reader *r)
{
    png_textp texts;
    int count = png_get_text(r->png, r->info, &texts, NULL);
    for (int i = 0; i < count && !r->value; i++)
        if (!strcmp(texts[i].key, r->key) && !(r->value = strdup(texts[i].text)))
            return fail(ERR_NOMEM, "%s: out of memory", r->name);
    return 0;
}

static int png_read_pixels(struct png_reader *r)
{
    TRY(png_prepare(r));
    size_t row = png_get_rowbytes(r->png, r->info), height = (size_t)r->image.height;
    BUG_IF(row != (size_t)r->image.width * (size_t)r->image.channels);
    r->rows = malloc(height * sizeof *r->rows);
    if (!r->rows)
        return fail(ERR_NOMEM, "%s: out of memory", r->name);
    for (size_t y = 0; y < height; y++)
        r->rows[y] = r->image.pixels + y * row;
    png_read_image(r->png, r->rows);
    png_read_end(r->png, r->info);
    return r->key ? png_find_text(r) : 0;
}

static int png_start(struct png_reader *r)
{
    r->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, r, png_failed, png_warned);
    r->info = r->png ? png_create_info_struct(r->png) : NULL;
    if (!r->info)
        return fail(ERR_NOMEM, "%s: out of memory", r->name);
    png_set_read_fn(r->png, r, png_take);
    png_set_user_limits(r->png, IMAGE_MAX_SIDE, IMAGE_MAX_SIDE);
    return 0;
}

static int png_run(struct png_reader *r, int (*step)(struct png_reader *r))
{
    r->code = 0;
    int code = png_start(r);
    if (code == 0)
        code = setjmp(png_jmpbuf(r->png)) ? r->code : step(r);
    png_destroy_read_struct(&r->png, &r->info, NULL);
    free(r->rows);
    return code;
}

static int png_decode(struct png_reader *r, struct image *out)
{
    int code = png_run(r, png_read_pixels);
    if (code < 0)
        image_free(&r->image);
    *out = r->image;
    return code;
}

// ---- JPEG, reading ------------------------------------------------------------------------------

struct jpeg_reader {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf jump;
    const char *name;
    int code;
    struct image image;
    uint8_t *line; // CMYK
};

static void jpeg_failed(j_common_ptr jpeg)
{
    struct jpeg_reader *r = jpeg->client_data;
    char what[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, what);
    r->code = fail(ERR_INPUT, "%s: damaged JPEG image: %s", r->name, what);
    longjmp(r->jump, 1);
}

// libjpeg goes on after damage and makes pixels up; damage to the picture is an error here. Other
// warnings (bytes between markers, unknown revisions) are common in good files.
static void jpeg_warned(j_common_ptr jpeg, int level)
{
    int what = jpeg->err->msg_code;
    if (level < 0 &&
        (what == JWRN_JPEG_EOF || what == JWRN_HIT_MARKER || what == JWRN_HUFF_BAD_CODE ||
         what == JWRN_ARITH_BAD_CODE || what == JWRN_MUST_RESYNC))
        jpeg_failed(jpeg);
}

// Adobe's CMYK files are stored inverted.
static void cmyk_to_rgb(const uint8_t *in, uint8_t *out, int width, bool inverted)
{
    for (int x = 0; x < width; x++, in += 4, out += 3) {
        unsigned k = inverted ? in[3] : 255u - in[3];
        for (int c = 0; c < 3; c++) {
            unsigned ink = inverted ? in[c] : 255u - in[c];
            out[c] = (uint8_t)((ink * k + 127) / 255);
        }
    }
}

// Huffman codes take a bit or more for each 8x8 block of the finest component; arithmetic coding,
// which hardly anyone uses, can do with less.
static int jpeg_check_size(const struct jpeg_reader *r)
{
    const uint64_t width = r->jpeg.image_width, height = r->jpeg.image_height;
    const uint64_t across = (width + 7) / 8, down = (height + 7) / 8;
    const uint64_t bits = 8 * (uint64_t)r->jpeg.src->bytes_in_buffer;
    if (width * height > IMAGE_MAX_PIXELS)
        return 0; // image_new() says so
    if (across * down > (r->jpeg.arith_code ? 16 * bits : bits))
        return fail(ERR_INPUT, "%s: damaged JPEG image: it is cut short", r->name);
    return 0;
}

static int jpeg_prepare(struct jpeg_reader *r)
{
    jpeg_read_header(&r->jpeg, TRUE);
    TRY(jpeg_check_size(r));
    J_COLOR_SPACE space = r->jpeg.jpeg_color_space;
    if (space == JCS_GRAYSCALE)
        r->jpeg.out_color_space = JCS_GRAYSCALE;
    else if (space == JCS_CMYK || space == JCS_YCCK)
        r->jpeg.out_color_space = JCS_CMYK;
    else
        r->jpeg.out_color_space = JCS_RGB;
    r->jpeg.dct_method = JDCT_ISLOW;
    if (image_new((int)r->jpeg.image_width, (int)r->jpeg.image_height,
                  space == JCS_GRAYSCALE ? 1 : 3, &r->image) < 0)
        return fail_in(ERR_INPUT, "%s", r->name);
    r->line = malloc((size_t)r->image.width * 4);
    return r->line ? 0 : fail(ERR_NOMEM, "%s: out of memory", r->name);
}

static int jpeg_read_pixels(struct jpeg_reader *r)
{
    TRY(jpeg_prepare(r));
    jpeg_start_decompress(&r->jpeg);
    size_t row = (size_t)r->image.width * (size_t)r->image.channels;
    bool cmyk = r->jpeg.out_color_space == JCS_CMYK;
    while (r->jpeg.output_scanline < r->jpeg.output_height) {
        uint8_t *to = r->image.pixels + r->jpeg.output_scanline * row;
        JSAMPROW line = cmyk ? r->line : to;
        if (jpeg_read_scanlines(&r->jpeg, &line, 1) && cmyk)
            cmyk_to_rgb(line, to, r->image.width, r->jpeg.saw_Adobe_marker);
    }
    jpeg_finish_decompress(&r->jpeg);
    return 0;
}

static int jpeg_decode(struct jpeg_reader *r, const uint8_t *data, size_t bytes, struct image *out)
{
    r->jpeg.err = jpeg_std_error(&r->errors);
    r->errors.error_exit = jpeg_failed;
    r->errors.emit_message = jpeg_warned;
    r->jpeg.client_data = r;
    int code;
    if (setjmp(r->jump)) {
        code = r->code;
    } else {
        jpeg_create_decompress(&r->jpeg);
        jpeg_mem_src(&r->jpeg, data, (unsigned long)bytes);
        code = jpeg_read_pixels(r);
    }
    jpeg_destroy_decompress(&r->jpeg);
    free(r->line);
    if (code < 0)
        image_free(&r->image);
    *out = r->image;
    return code;
}

// ---- either -------------------------------------------------------------------------------------

int image_decode(const void *data, size_t bytes, const char *name, int channels, struct image *out)
{
    *out = (struct image){0};
    const uint8_t *b = data;
    int code;
    if (bytes >= 8 && !memcmp(b, "\x89PNG\r\n\x1a\n", 8)) {
        struct png_reader r = {.data = b, .left = bytes, .name = name};
        code = png_decode(&r, out);
    } else if (bytes >= 3 && !memcmp(b, "\xff\xd8\xff", 3)) {
        struct jpeg_reader r = {.name = name};
        code = jpeg_decode(&r, b, bytes, out);
    } else {
        code = fail(ERR_INPUT, "%s: %s", name,
                    bytes ? "its content is neither a PNG nor a JPEG image" : "the file is empty");
    }
    if (code == 0 && (code = set_channels(out, channels)) < 0)
        image_free(out);
    return code;
}

static int read_all(int fd, const char *path, uint8_t **data, size_t *bytes)
{
    struct stat s;
    if (fstat(fd, &s) < 0)
        return fail(ERR_IO, "%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISREG(s.st_mode))
        return fail(ERR_IO, "%s: cannot be read: not a regular file", path);
    if ((size_t)s.st_size > FILE_MAX)
        return fail(ERR_INPUT, "%s: larger than 1 GiB", path);
    *data = malloc((size_t)s.st_size + 1);
    if (!*data)
        return fail(ERR_NOMEM, "%s: out of memory", path);
    *bytes = 0;
    while (*bytes < (size_t)s.st_size) {
        ssize_t n = read(fd, *data + *bytes, (size_t)s.st_size - *bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail(ERR_IO, "%s: cannot be read: %s", path, strerror(errno));
        if (n == 0)
            break;
        *bytes += (size_t)n;
    }
    return 0;
}

// On failure too *data may be set and is the caller's to free.
static int read_file(const char *path, uint8_t **data, size_t *bytes)
{
    *data = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return fail(ERR_IO, "%s: cannot be opened: %s", path, strerror(errno));
    int code = read_all(fd, path, data, bytes);
    close(fd);
    return code;
}

int image_read(const char *path, int channels, struct image *out)
{
    *out = (struct image){0};
    uint8_t *data;
    size_t bytes;
    int code = read_file(path, &data, &bytes);
    if (code == 0)
        code = image_decode(data, bytes, path, channels, out);
    free(data);
    return code;
}

// ---- PNG, writing -------------------------------------------------------------------------------

struct png_writer {
    png_structp png;
    png_infop info;
    struct atomic_file *file;
    const char *name;
    int code;
};

static void png_write_failed(png_structp png, png_const_charp what)
{
    struct png_writer *w = png_get_error_ptr(png);
    if (w->code == 0)
        w->code = fail(ERR_INPUT, "%s: cannot be written: %s", w->name, what);
    png_longjmp(png, 1);
}

static void png_put(png_structp png, png_bytep from, size_t bytes)
{
    struct png_writer *w = png_get_io_ptr(png);
    w->code = atomic_file_write(w->file, from, bytes);
    if (w->code < 0)
        png_error(png, "write error");
}

static void png_flush_nothing(png_structp png)
{
    (void)png;
}

static void png_put_text(struct png_writer *w, const struct image_text *text)
{
    bool ascii = true;
    for (const char *p = text->value; *p; p++)
        ascii &= (unsigned char)*p < 128;
    png_text chunk = {
        .compression = ascii ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE,
        .key = (char *)text->key,
        .text = (char *)text->value,
        .text_length = strlen(text->value),
    };
    png_set_text(w->png, w->info, &chunk, 1);
}

static int png_write_pixels(struct png_writer *w, const struct image *image,
                            const struct image_text *texts, int count)
{
    png_set_write_fn(w->png, w, png_put, png_flush_nothing);
    png_set_IHDR(w->png, w->info, (png_uint_32)image->width, (png_uint_32)image->height, 8,
                 image->channels == 1 ? PNG_COLOR_TYPE_GRAY : PNG_COLOR_TYPE_RGB,
                 PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    for (int i = 0; i < count; i++)
        png_put_text(w, &texts[i]);
    png_write_info(w->png, w->info);
    size_t row = (size_t)image->width * (size_t)image->channels;
    for (int y = 0; y < image->height; y++)
        png_write_row(w->png, image->pixels + (size_t)y * row);
    png_write_end(w->png, NULL);
    return 0;
}

static int png_encode(struct png_writer *w, const struct image *image,
                      const struct image_text *texts, int count)
{
    w->png = png_create_write_struct(PNG_LIBPNG_VER_STRING, w, png_write_failed, png_warned);
    w->info = w->png ? png_create_info_struct(w->png) : NULL;
    int code;
    if (!w->info)
        code = fail(ERR_NOMEM, "%s: out of memory", w->name);
    else
        code = setjmp(png_jmpbuf(w->png)) ? w->code : png_write_pixels(w, image, texts, count);
    png_destroy_write_struct(&w->png, &w->info);
    return code;
}

int image_write_png(const char *path, const struct image *image, const struct image_text *texts,
                    int count)
{
    struct png_writer w = {.name = path};
    TRY(atomic_file_create(path, &w.file));
    int code = png_encode(&w, image, texts, count);
    if (code == 0)
        return atomic_file_commit(w.file);
    atomic_file_abort(w.file);
    return code;
}

// ---- PNG text -----------------------------------------------------------------------------------

int image_read_text(const char *path, const char *key, char **value)
{
    *value = NULL;
    struct png_reader r = {.name = path, .key = key};
    uint8_t *data;
    size_t bytes;
    int code = read_file(path, &data, &bytes);
    if (code == 0 && (bytes < 8 || png_sig_cmp(data, 0, 8)))
        code = fail(ERR_INPUT, "%s: not a PNG image", path);
    if (code == 0) {
        struct image image;
        r.data = data;
        r.left = bytes;
        code = png_decode(&r, &image);
        image_free(&image);
    }
    free(data);
    *value = r.value;
    return code;
}
