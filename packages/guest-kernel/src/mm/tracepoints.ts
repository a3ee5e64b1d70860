/** Where a run may listen, as one would with `tracefs`: `kmem:*` and `filemap:*` of Linux's names. Null costs a compare. */
export interface Tracepoints {
  /** `mm_page_alloc`: `gfp` as the allocator has it (`GFP_*`). */
  pageAlloc(pfn: number, order: number, migratetype: number, gfp: number): void;
  /** `mm_page_free`. */
  pageFree(pfn: number, order: number): void;
  /** `mm_filemap_add_to_page_cache`: page `index` of file `inode`. */
  cacheAdd(pfn: number, inode: number, index: number): void;
  /** `mm_filemap_delete_from_page_cache`, reclaimed pages too; a page that migrates stays. */
  cacheDelete(pfn: number, inode: number, index: number): void;
}
