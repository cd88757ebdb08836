/* Included into every C and C++ program that is not told -noheaders. The guest has it in /usr/include.

   Before main: stdout without a buffer, so that a crash loses nothing; the locale of the environment; printf's %b.
   At the end of main: when the program printed nothing, a copy of it leaves a core file, from which its variables
   are read. Only ISO C is included; the few system calls have names of their own, so that any -std will do. */
#ifndef PBOTVM_PRELUDE_H
#define PBOTVM_PRELUDE_H

#include <limits.h>
#include <wchar.h>
#include <stdio.h>
#include <printf.h>
#include <locale.h>

#ifdef __cplusplus
extern "C" {
#endif
extern int pbotvm_fork(void) __asm__("fork");
extern int pbotvm_getpid(void) __asm__("getpid");
extern int pbotvm_raise(int) __asm__("raise");
extern void (*pbotvm_signal(int, void (*)(int)))(int) __asm__("signal");
extern int pbotvm_waitpid(int, int *, int) __asm__("waitpid");
extern void pbotvm_exit(int) __asm__("_exit");
#ifdef __cplusplus
}
#endif

#define PBOTVM_KEPT __attribute__((__unused__))
#ifdef __clang__
#define PBOTVM_HELD __attribute__((__noinline__, __used__, __optnone__))
#else
#define PBOTVM_HELD __attribute__((__noinline__, __used__, __noclone__))
#endif

static int pbotvm_pid PBOTVM_KEPT;
static int pbotvm_dumped PBOTVM_KEPT;
static unsigned long long pbotvm_written_before PBOTVM_KEPT;

/* The bytes that this process and its ended children have written. */
PBOTVM_KEPT static unsigned long long pbotvm_written(void) {
    unsigned long long read = 0, written = 0;
    FILE *file = fopen("/proc/self/io", "r");
    if (file) {
        if (fscanf(file, "rchar: %llu wchar: %llu", &read, &written) != 2) written = (unsigned long long) -1;
        fclose(file);
    }
    return written;
}

/* What the debugger looks for in a core file: this function in the stack of a copy that ended by SIGABRT. */
PBOTVM_HELD static void pbotvm_dump(void) {
    int child, status;
    if (pbotvm_dumped || pbotvm_pid != pbotvm_getpid()) return;
    fflush(stdout);
    if (pbotvm_written() != pbotvm_written_before) return;
    pbotvm_dumped = 1;
    child = pbotvm_fork();
    if (!child) {
        pbotvm_signal(6, (void (*)(int)) 0);
        pbotvm_raise(6);
        pbotvm_exit(1);
    }
    if (child > 0) pbotvm_waitpid(child, &status, 0);
}

PBOTVM_HELD static void pbotvm_end_of_main(void) {
    pbotvm_dump();
}

PBOTVM_HELD static void pbotvm_leaves_main(int *unused) {
    (void) unused;
    pbotvm_dump();
}

PBOTVM_HELD static void pbotvm_last(const char *statement, int is_void, const volatile void *value) {
    (void) statement;
    (void) is_void;
    (void) value;
    pbotvm_dump();
}

PBOTVM_HELD static void pbotvm_last_place(const char *statement) {
    (void) statement;
    pbotvm_dump();
}

#define PBOTVM_MAIN int pbotvm_main __attribute__((__cleanup__(pbotvm_leaves_main), __unused__)) = 0;

#ifdef __cplusplus
struct pbotvm_void {};
template <class T> T operator,(T &&value, pbotvm_void) { return static_cast<T &&>(value); }
#define PBOTVM_LAST(text, e) { auto &&pbotvm_value = (e, pbotvm_void()); pbotvm_last(text, 0, (const volatile void *) &pbotvm_value); }
#else
#define PBOTVM_IS_VOID(e) __builtin_types_compatible_p(__typeof__(e), void)
#define PBOTVM_LAST(text, e) { \
    __extension__ __typeof__(__builtin_choose_expr(PBOTVM_IS_VOID(e), 0, e)) pbotvm_value = \
        __builtin_choose_expr(PBOTVM_IS_VOID(e), (e, 0), e); \
    pbotvm_last(text, PBOTVM_IS_VOID(e), &pbotvm_value); }
#endif

/* printf("%b"): unsigned binary. # pads to a multiple of four digits, #' puts points between groups of four,
   ' alone groups as the locale does. */
PBOTVM_KEPT static int pbotvm_binary(FILE *stream, const struct printf_info *info, const void *const *arguments) {
    char digits[sizeof(unsigned long long) * CHAR_BIT * 2 + 1];
    int least, count = 0, length = 0, padding, place = (int) sizeof digits, total;
    const char *separator = "";
    unsigned long long value;
    if (info->is_long_double) value = **(const unsigned long long *const *) arguments;
    else if (info->is_long) value = **(const unsigned long *const *) arguments;
    else if (info->is_short) value = (unsigned short) **(const unsigned int *const *) arguments;
    else if (info->is_char) value = (unsigned char) **(const unsigned int *const *) arguments;
    else value = **(const unsigned int *const *) arguments;

    if (info->alt && info->group) separator = ".";
    else if (info->group) separator = localeconv()->thousands_sep;
    least = info->prec < 0 ? 1 : info->prec;
    if (least > 64) least = 64;
    while (value || count < least || (info->alt && count % 4)) {
        if (count && separator[0] && count % (info->alt ? 4 : 3) == 0 && place > 0) digits[--place] = separator[0], length++;
        digits[--place] = (char) ('0' + (int) (value & 1));
        value >>= 1;
        count++;
        length++;
    }
    padding = info->width - length;
    total = length + (padding > 0 ? padding : 0);
    if (!info->left)
        for (; padding > 0; padding--) putc(info->pad == '0' ? '0' : ' ', stream);
    for (; length > 0; length--) putc(digits[place++], stream);
    for (; padding > 0; padding--) putc(' ', stream);
    return total;
}

PBOTVM_KEPT static int pbotvm_binary_type(const struct printf_info *info, size_t count, int *types, int *sizes) {
    if (count > 0) {
        types[0] = PA_INT | (info->is_long_double ? PA_FLAG_LONG_LONG : info->is_long ? PA_FLAG_LONG : 0);
        sizes[0] = info->is_long_double ? (int) sizeof(long long) : info->is_long ? (int) sizeof(long) : (int) sizeof(int);
    }
    return 1;
}

__attribute__((__constructor__)) static void pbotvm_begin(void) {
    setvbuf(stdout, NULL, _IONBF, 0);
    setlocale(LC_ALL, "");
    register_printf_specifier('b', pbotvm_binary, pbotvm_binary_type);
    pbotvm_pid = pbotvm_getpid();
    pbotvm_written_before = pbotvm_written();
}

/* Commands for the debugger. It stops here and looks at the text. */
PBOTVM_HELD static void gdb(const char *command) {
    __asm__ __volatile__("" : : "g"(command) : "memory");
}

#define dump(expression) gdb("print " #expression)
#define print(expression) gdb("print " #expression)
#define ptype(expression) gdb("ptype " #expression)
#define whatis(expression) gdb("whatis " #expression)
#define trace(function) gdb("break " #function)
#define watch(expression) gdb("watch " #expression)
#define print_last_statement(expression) gdb("print_last_statement " #expression)

#endif
