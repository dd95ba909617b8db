# bidensify_operator(TARGET): the operator on plain memory (call.cpp, spec.cpp) and its kernels become part of the library TARGET.
set(BIDENSIFY_OPERATOR "${CMAKE_CURRENT_LIST_DIR}")
get_filename_component(default_kernels "${BIDENSIFY_OPERATOR}/../../../kernels/csrc/packed" ABSOLUTE)
set(BIDENSIFY_KERNELS "${default_kernels}" CACHE PATH "Sources of the kernels")
if(MSVC)
  message(FATAL_ERROR "the kernels use GCC/Clang vector types; build with clang")
endif()
find_package(Threads REQUIRED)

function(bidensify_operator target)
  file(GLOB kernels CONFIGURE_DEPENDS "${BIDENSIFY_KERNELS}/*.cpp")
  # What is built for one instruction set comes below; memory.cpp is of torch's tensors.
  list(FILTER kernels EXCLUDE REGEX "/(inner_.*|memory)\\.cpp$")
  list(APPEND kernels "${BIDENSIFY_KERNELS}/inner_portable.cpp")
  # A fused multiply-add rounds differently, and every instruction set must give the same bits.
  target_compile_options(${target} PRIVATE -O3 -ffp-contract=off -fno-math-errno -fwrapv -Wall -Wextra -Wno-psabi
    -Wno-unused-parameter)
  target_compile_definitions(${target} PRIVATE BD_API=)
  set_target_properties(${target} PROPERTIES CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  target_include_directories(${target} PUBLIC ${BIDENSIFY_OPERATOR} PRIVATE ${BIDENSIFY_KERNELS})
  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
  if(processor MATCHES "x86_64|amd64")
    list(APPEND kernels ${BIDENSIFY_KERNELS}/inner_avx2.cpp ${BIDENSIFY_KERNELS}/inner_avx512.cpp)
    target_compile_definitions(${target} PRIVATE BD_WITH_AVX2 BD_WITH_AVX512)
    set_source_files_properties(${BIDENSIFY_KERNELS}/inner_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mbmi2;-mpopcnt")
    set_source_files_properties(${BIDENSIFY_KERNELS}/inner_avx512.cpp PROPERTIES COMPILE_OPTIONS
      "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vpopcntdq;-mprefer-vector-width=512;-mfma;-mbmi2;-Wno-uninitialized;-Wno-maybe-uninitialized")
  elseif(processor MATCHES "aarch64|arm64")
    list(APPEND kernels ${BIDENSIFY_KERNELS}/inner_neon.cpp)
    target_compile_definitions(${target} PRIVATE BD_WITH_NEON)
  endif()
  target_sources(${target} PRIVATE ${BIDENSIFY_OPERATOR}/call.cpp ${BIDENSIFY_OPERATOR}/spec.cpp ${kernels})
  target_link_libraries(${target} PRIVATE Threads::Threads)
  if(NOT APPLE)
    target_link_options(${target} PRIVATE "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/exports.map" LINKER:--no-undefined)
    set_target_properties(${target} PROPERTIES LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/exports.map)
  endif()
endfunction()
