# Writes a C file holding FILES, one after the other, as one array of bytes called NAME (and NAME_size).
# cmake -DFILES=a;b -DNAME=symbol -DOUT=file.c -P embed.cmake
set(hex "")
foreach(file IN LISTS FILES)
    file(READ ${file} part HEX)
    string(APPEND hex ${part})
endforeach()
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
string(REGEX REPLACE "(0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,)" "\\1\n" bytes "${bytes}")
file(WRITE ${OUT} "// made by tools/cmake/embed.cmake\n#include <stddef.h>\nextern const unsigned char ${NAME}[];\nextern const size_t ${NAME}_size;\n_Alignas(64) const unsigned char ${NAME}[] = {\n${bytes}0};\nconst size_t ${NAME}_size = sizeof ${NAME} - 1;\n")
