// Leaks that are not ours, for builds with -DDITMOE_SANITIZE=ON: LeakSanitizer asks this function.
// Ours are never listed here.
const char *__lsan_default_options(void);
const char *__lsan_default_suppressions(void);

const char *__lsan_default_options(void)
{
    return "print_suppressions=0";
}

const char *__lsan_default_suppressions(void)
{
    return "leak:libfontconfig\n"; // keeps what it knows of fonts until the process ends
}
